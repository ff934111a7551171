"""The tokens of each document of a source, without reading those of all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Lengths(Protocol):
    """Tokens of each document: an array, or what stands for one."""

    def __len__(self) -> int: ...
    def __getitem__(self, documents: Any, /) -> Any:
        """Return the tokens of one document, or of an array of documents."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ChainedLengths:
    """The lengths of several shards as one sequence, without reading them."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(p) for p in parts], dtype=np.int64).tolist()

    def find(self, document: int) -> tuple[int, int]:
        """Return the part that holds a document, and its index there."""
        if not 0 <= document < self._ends[-1]:
            raise IndexError(f"document {document} of {self._ends[-1]}")
        part = bisect_right(self._ends, document)
        return part, document - (self._ends[part] - len(self.parts[part]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, documents: Any) -> Any:
        if isinstance(documents, int):
            part, index = self.find(documents)
            return int(self.parts[part][index])
        order = np.argsort(documents)
        ascending = np.asarray(documents)[order]
        found = np.empty(len(order), np.int64)
        stops = np.searchsorted(ascending, self._ends)
        for part in np.flatnonzero(np.diff(stops, prepend=0)).tolist():
            here = slice(stops[part - 1] if part else 0, stops[part])
            found[order[here]] = self.parts[part][
                ascending[here] - (self._ends[part] - len(self.parts[part]))]
        return found

    def __iter__(self) -> Iterator[int]:
        for part in self.parts:
            yield from part.tolist()
