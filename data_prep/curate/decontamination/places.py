"""Places of units in the text as it was written."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

from megatron_sov.base.documents.overlap import Units, fold

_CLUSTERS = regex.compile(r"\X")


def places(text: str, units: Units, stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where stretches of units begin and end in a text, in characters.

    Args:
        text: as it was written.
        units: its units.
        stretches: first unit, and the unit behind the last, of each.
    """
    spans = [units.span(begin, end) for begin, end in stretches]
    if units.folded == text:
        return spans
    starts, ends = _clusters(text, units.folded)
    return [(starts[start], ends[stop - 1]) for start, stop in spans]


def _clusters(text: str, folded: str) -> tuple[list[int], list[int]]:
    """Return for each character of the folded text where that from which it was made begins and ends:
    what a reader takes for one character, which Unicode's forms do not reach beyond."""
    starts: list[int] = []
    ends: list[int] = []
    is_folded = folded != unicodedata.normalize("NFKC", text)
    for found in _CLUSTERS.finditer(text):
        size = len(fold(found[0]) if is_folded else unicodedata.normalize("NFKC", found[0]))
        starts += [found.start()] * size
        ends += [found.end()] * size
    if len(starts) != len(folded):  # a form that does: the whole text is the place
        return [0] * len(folded), [len(text)] * len(folded)
    return starts, ends


def whole_lines(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the lines that hold places, with their ends, in order and joined where they touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        begin = text.rfind("\n", 0, start) + 1
        end = text.find("\n", stop - 1) + 1 or len(text)
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return a text without some of its stretches, which are in order and do not overlap."""
    kept, at = [], 0
    for start, stop in spans:
        kept.append(text[at:start])
        at = stop
    return "".join([*kept, text[at:]])
