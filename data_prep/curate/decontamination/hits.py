"""What is told of a found item: which one, where, and what stands around it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from data_prep.curate.decontamination.places import places
from megatron_sov.base.documents.item_search import ItemSearch, plain
from megatron_sov.base.documents.overlap import find_units

MOST_HITS = 1000
"""Of one text that are told; one that has so many is not worth more room."""
MOST_CHARACTERS = 1000
"""Of a found text that are shown."""


@dataclass(frozen=True)
class Hit:
    """A place in a text that an item of a benchmark has too."""

    benchmark: str
    """Name of the benchmark's file."""
    item: str
    """Id of the record, or its line."""
    field: str
    """Field of the record."""
    start: int
    """Where the place begins in the text, in characters."""
    stop: int
    """Where it ends."""
    before: str
    """What stands before it."""
    found: str
    """What stands there."""
    after: str
    """What stands behind it."""

    @staticmethod
    def read(row: dict[str, Any]) -> Hit:
        """Return the hit of a row that was made of it."""
        return Hit(**{name: row[name] for name in Hit.__dataclass_fields__})


def find_hits(text: str, search: ItemSearch, context_chars: int) -> list[Hit]:
    """Return what a text has of benchmarks.

    Args:
        text: to search.
        search: for what.
        context_chars: to show on either side.
    """
    found = _found(text, search)
    if (other := plain(text)) is not None:
        known = defaultdict(list)
        for number, start, stop in found:
            known[number].append((start, stop))
        for number, start, stop in _found(other.text, search):
            start, stop = int(other.starts[start]), int(other.ends[stop - 1])
            if not any(a < stop and start < b for a, b in known[number]):
                found.append((number, start, stop))
    hits = []
    for number, start, stop in found[:MOST_HITS]:
        item = search.items[number]
        hits.append(Hit(item.benchmark, item.id, item.field, start, stop,
                        text[max(0, start - context_chars):start],
                        text[start:min(stop, start + MOST_CHARACTERS)], text[stop:stop + context_chars]))
    return hits


def _found(text: str, search: ItemSearch) -> list[tuple[int, int, int]]:
    """Return number of an item, and where it begins and ends in a text."""
    units = find_units(text)
    found = search.find(units)[:MOST_HITS]
    spans = places(text, units, [(f.begin, f.end) for f in found]) if found else []
    return [(one.item, *span) for one, span in zip(found, spans, strict=True)]
