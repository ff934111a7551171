"""Search a response for JSON or for regular expressions with a time limit.

A user's pattern on a model's response could run forever. `regex` can stop during a match; the standard `re`
cannot.
"""

import json
import re
from functools import lru_cache
from typing import Any

import regex

from megatron_sov.base.documents.rows import reject_constant
from megatron_sov.judge.rewards.reward import Refused, TooLong

TIME_LIMIT_S = 2.0
"""Processor time per search; reasonable patterns take milliseconds per megabyte."""
MAX_JSON_CHARS = 1_000_000
NO_JSON = object()
"""Result for text that is not JSON."""
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)


@lru_cache(maxsize=4096)
def _compile_pattern(pattern: str, flags: int) -> Any:
    return regex.compile(pattern, flags)


def find_pattern_problem(pattern: str) -> str:
    """Return the reason why a pattern is invalid, or ""."""
    try:
        _compile_pattern(pattern, 0)
    except (regex.error, RecursionError, OverflowError) as e:
        return str(e) or type(e).__name__
    return ""


def search(pattern: str, text: str, flags: int = 0) -> Any:
    """Return the first match, or None.

    Raises:
        TooLong: the search takes longer than `TIME_LIMIT_S`.
    """
    return _run_limited(_compile_pattern(pattern, flags).search, pattern, text)


def fullmatch(pattern: str, text: str, flags: int = 0) -> Any:
    """Match a whole text; raises like `search`."""
    return _run_limited(_compile_pattern(pattern, flags).fullmatch, pattern, text)


def findall(pattern: str, text: str, flags: int = 0) -> list[Any]:
    """Return all matches like `re.findall`; raises like `search`."""
    return list(_run_limited(_compile_pattern(pattern, flags).findall, pattern, text))


def _run_limited(action: Any, pattern: str, text: str) -> Any:
    try:
        # `regex` checks processor time during a match.
        return action(text, timeout=TIME_LIMIT_S)
    except TimeoutError:
        short_pattern = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise TooLong(f"the pattern {short_pattern!r} takes longer than {TIME_LIMIT_S:g} s of a processor "
                      "over this response; write it without nested repetitions") from None


def parse_json(text: str) -> Any:
    """Parse a whole text as JSON, optionally inside a Markdown fence; return `NO_JSON` for other texts.

    NaN and Infinity are invalid (RFC 8259), as is nesting beyond Python's limit.

    Raises:
        Refused: the text is longer than `MAX_JSON_CHARS`.
    """
    if len(text) > MAX_JSON_CHARS:
        raise Refused(f"has {len(text):,} characters; JSON is looked for in at most {MAX_JSON_CHARS:,}")
    # Only a fence around the whole text: JSON within prose is not a JSON response.
    fenced = _FENCE.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        return NO_JSON
