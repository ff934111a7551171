"""Format: whether a response has the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_sov.documents.strict_json import no_constant
from megatron_sov.rewards import patterns
from megatron_sov.rewards.reward import Refused, Row, Score, text_of
from megatron_sov.settings import Bound, Breach, Code, Problem

MAX_JSON_CHARS = 1_000_000
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)


def _no_regex(text: str) -> Breach | None:
    wrong = patterns.problem(text) if text else ""
    return (Code.RULE, f"is no regular expression ({wrong})", "mend it") if wrong else None


def _no_name(text: str) -> Breach | None:
    return None if re.fullmatch(r"[A-Za-z_][\w-]*", text) else (
        Code.RULE, "must be a name of letters, digits, - and _", "")


@dataclass(frozen=True)
class Format:
    """The share of the asked-for checks that a response passes; all or nothing by setting."""

    CONTROL, cpu_limit_s = "", 10.0

    regex: Annotated[str, Bound(_no_regex)] = ""
    """A pattern that the response, white space around it removed, matches as a whole; `.` takes line ends."""
    tags: tuple[Annotated[str, Bound(_no_name)], ...] = ()
    """Names such as think, answer: each stands once as <think>...</think>, in this order, with something in
    it, and nothing but white space stands around them."""
    json: bool = False
    """The response is one JSON value, in a Markdown fence or not."""
    json_keys: tuple[str, ...] = ()
    """The JSON is an object with these keys."""
    field: str = "response"
    """Field of the row that is looked at."""
    all_or_nothing: bool = True
    """1 or 0; without, the share of checks that pass."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        return [] if self.regex or self.tags or self.json or self.json_keys else [
            Problem(Code.RULE, "", "nothing is asked for", way_out="set regex, tags, json or json_keys")]

    def score(self, row: Row) -> Score:
        """Return the share of checks that pass, or whether all do."""
        passed = dict(self._checks(text_of(row, self.field).strip()))
        share = sum(passed.values()) / len(passed)
        return Score(float(share == 1) if self.all_or_nothing else share, passed)

    def _checks(self, text: str) -> Iterator[tuple[str, bool]]:
        if self.regex:
            yield "regex", patterns.fullmatch(self.regex, text, patterns.regex.DOTALL) is not None
        if self.tags:
            yield "tags", tagged(text, self.tags)
        if self.json or self.json_keys:
            found = json_of(text)
            yield "json", found is not NO_JSON
            if self.json_keys:
                yield "json_keys", isinstance(found, dict) and set(self.json_keys) <= set(found)


def tagged(text: str, tags: tuple[str, ...]) -> bool:
    """Return whether a text is these elements one after the other, each once and not empty."""
    place = 0
    for tag in tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        if text.count(begin) != 1 or text.count(end) != 1:
            return False
        start = text.index(begin)
        stop = text.index(end)
        if start < place or text[place:start].strip() or not text[start + len(begin):stop].strip():
            return False
        place = stop + len(end)
    return not text[place:].strip()


NO_JSON = object()
"""What `json_of` returns for a text that is none."""


def json_of(text: str) -> Any:
    """Return the JSON value that a whole text is, without a Markdown fence around it; `NO_JSON` for none.

    NaN and Infinity are no JSON (RFC 8259); what is nested deeper than Python reads is none either.

    Raises:
        Refused: the text is longer than `MAX_JSON_CHARS`.
    """
    if len(text) > MAX_JSON_CHARS:
        raise Refused(f"has {len(text):,} characters; JSON is looked for in at most {MAX_JSON_CHARS:,}")
    fenced = _FENCE.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return NO_JSON
