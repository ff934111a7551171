"""Quotations that a translation must leave as they are: functions look for a constraint's very words."""

from __future__ import annotations

import re

_QUOTED = re.compile(r'"[^"\n]+"|“[^”\n]+”|「[^」\n]+」|`[^`\n]+`|<<[^<>\n]+>>|(?<!\w)\'[^\'\n]+\'(?!\w)')
_MARKS = '"“”「」`\''


def quoted(text: str) -> list[str]:
    """Return what stands in quotation marks, backquotes or double angle brackets, in order, without marks."""
    return [found.strip(_MARKS) for found in _QUOTED.findall(text)]


def with_quotes_of(text: str, translation: str) -> str | None:
    """Return a translation with the quotations of its text in their places, as Typhoon-S puts them back
    where a translator changed them; None: it has another number of them.

    Where all words of the text's quotations stand in the translation it stays as it is, whatever marks the
    language puts around them and in whatever order.
    """
    wanted = quoted(text)
    if all(translation.count(words) >= wanted.count(words) for words in wanted):
        return translation
    if len(quoted(translation)) != len(wanted):
        return None
    left = iter(wanted)

    def put_back(match: re.Match[str]) -> str:
        inside = match[0].strip(_MARKS)
        return match[0].replace(inside, next(left))

    return _QUOTED.sub(put_back, translation)
