"""The search of texts for items of benchmarks, by runs of words (`documents.overlap`).

An item of `ngram` words or more is found where one of its runs of so many words is.  A shorter one is found
where all of it is; one below `min_words` says too little to be looked for.  A text's runs are looked up in a
table of one byte for each value of their first bits, and those few that may be an item's among all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.overlap import TWELFTHS, Units, find_units, stretch_hashes
from megatron_sov.base.documents.plain import plain

_BYTES_PER_KEY = 32
_MIN_BITS, _MAX_BITS = 12, 30


@dataclass(frozen=True)
class SearchItem:
    """One text of a benchmark."""

    benchmark: str
    """Name of its file, without the ending, or of its task."""
    id: str
    """The record's own, or its line."""
    field: str
    """Which of the record's fields it is."""
    text: str


@dataclass(frozen=True)
class FoundItem:
    """An item, and where a text has it."""

    item: int
    """Its number."""
    begin: int
    """First unit of the stretch."""
    end: int
    """The unit behind it."""


class ItemSearch:
    """Looks for items."""

    def __init__(self, items: Sequence[SearchItem], ngram: int, min_words: int) -> None:
        """Prepare.

        Args:
            items: of all benchmarks.
            ngram: words of a run.
            min_words: shorter items are left out; at most `ngram`.
        """
        self.items, self.ngram, self.min_words = items, ngram, min_words
        self.too_short: list[int] = []
        """Numbers of the items that are not looked for."""
        runs: dict[int, list[int]] = defaultdict(list)
        self._whole: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            self._add(number, find_units(item.text), runs)
            if (other := plain(item.text)) and (not self.too_short or self.too_short[-1] != number):
                self._add(number, find_units(other.text), runs)
        self._owners = runs
        self._runs, self._beginnings = _Keys(list(runs)), _Keys(list(self._whole))

    def _add(self, number: int, units: Units, runs: dict[int, list[int]]) -> None:
        """Look for an item in one of its forms."""
        if units.size >= self.ngram * TWELFTHS:
            for run in np.unique(units.runs(self.ngram)).tolist():
                if number not in runs[run][-1:]:
                    runs[run].append(number)
        elif units.size >= self.min_words * TWELFTHS:
            count = len(units.hashes)
            whole = stretch_hashes(units.hashes, np.array([0]), np.array([count]))
            entry = (count, int(whole[0]), number)
            if entry not in (known := self._whole[int(units.runs(self.min_words)[0])]):
                known.append(entry)
        elif number not in self.too_short:
            self.too_short.append(number)

    def find(self, units: Units) -> list[FoundItem]:
        """Return what a text has, by item and place; stretches of an item that touch are one."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        ends = units.run_ends(self.ngram)
        places = self._runs.places(stretch_hashes(units.hashes, np.arange(len(ends)), ends))
        for begin, run in places:
            for item in self._owners[run]:
                stretches = found[item]
                if stretches and begin <= stretches[-1][1]:
                    stretches[-1] = (stretches[-1][0], int(ends[begin]))
                else:
                    stretches.append((begin, int(ends[begin])))
        if self._whole:
            for begin, run in self._beginnings.places(units.runs(self.min_words)):
                for count, whole, item in self._whole[run]:
                    end = begin + count
                    if end <= len(units.hashes) and whole == int(stretch_hashes(
                            units.hashes[begin:end], np.array([0]), np.array([count]))[0]):
                        found[item].append((begin, end))
        return [FoundItem(item, *stretch) for item in sorted(found) for stretch in found[item]]


class _Keys:
    """A set of 64-bit keys that is asked for many at a time."""

    def __init__(self, keys: list[int]) -> None:
        self._keys = np.sort(np.array(keys, np.uint64))
        wanted = max(1, len(keys) * _BYTES_PER_KEY).bit_length()
        bits = min(max(wanted, _MIN_BITS), _MAX_BITS)
        self._shift = np.uint64(64 - bits)
        self._may_be = np.zeros(1 << bits, np.bool_)
        self._may_be[self._keys >> self._shift] = True

    def places(self, asked: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Return (place, key) of those asked for that are in the set."""
        places = np.flatnonzero(self._may_be[asked >> self._shift])
        if not len(places):
            return []
        nearest = np.minimum(np.searchsorted(self._keys, asked[places]), len(self._keys) - 1)
        places = places[self._keys[nearest] == asked[places]]
        return list(zip(places.tolist(), asked[places].tolist(), strict=True))
