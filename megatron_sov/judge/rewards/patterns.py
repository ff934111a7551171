"""What is looked for in a response: JSON, and regular expressions with a limit of time, since a user's
pattern over a model's response may take for ever.

`regex` stops in the middle of a match, which the standard library's `re` cannot.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import regex

from megatron_sov.base.documents.rows import reject_constant
from megatron_sov.judge.rewards.reward import Refused, TooLong

TIME_LIMIT_S = 2.0
"""Of a processor, per search, as `regex` counts it; a sound pattern takes milliseconds over a megabyte."""
MAX_JSON_CHARS = 1_000_000
NO_JSON = object()
"""What `json_of` returns for a text that is none."""
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)


@lru_cache(maxsize=4096)
def _compile_pattern(pattern: str, flags: int) -> Any:
    return regex.compile(pattern, flags)


def find_pattern_problem(pattern: str) -> str:
    """Return what is wrong with a pattern, or an empty text."""
    try:
        _compile_pattern(pattern, 0)
    except (regex.error, RecursionError, OverflowError) as e:
        return str(e) or type(e).__name__
    return ""


def search(pattern: str, text: str, flags: int = 0) -> Any:
    """Return the first match, or None.

    Raises:
        TooLong: it takes longer than `TIME_LIMIT_S`.
    """
    return _run_limited(_compile_pattern(pattern, flags).search, pattern, text)


def fullmatch(pattern: str, text: str, flags: int = 0) -> Any:
    """Return the match of a whole text, or None; raises as `search` does."""
    return _run_limited(_compile_pattern(pattern, flags).fullmatch, pattern, text)


def findall(pattern: str, text: str, flags: int = 0) -> list[Any]:
    """Return all matches as `re.findall` does; raises as `search` does."""
    return list(_run_limited(_compile_pattern(pattern, flags).findall, pattern, text))


def _run_limited(action: Any, pattern: str, text: str) -> Any:
    try:
        # `regex` looks at the processor's time itself, in the middle of a match
        return action(text, timeout=TIME_LIMIT_S)
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise TooLong(f"the pattern {shown!r} takes longer than {TIME_LIMIT_S:g} s of a processor over this "
                      "response; write it without nested repetitions") from None


def parse_json(text: str) -> Any:
    """Return the JSON value that a whole text is, without a Markdown fence around it; `NO_JSON` for none.

    NaN and Infinity are no JSON (RFC 8259); what is nested deeper than Python reads is none either.

    Raises:
        Refused: the text is longer than `MAX_JSON_CHARS`.
    """
    if len(text) > MAX_JSON_CHARS:
        raise Refused(f"has {len(text):,} characters; JSON is looked for in at most {MAX_JSON_CHARS:,}")
    # a fence around the whole alone: JSON inside of a text is no JSON response
    fenced = _FENCE.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        return NO_JSON
