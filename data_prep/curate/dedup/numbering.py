"""Numbers of documents, which say whose text stays: the smaller one's.

A number is ``rank << 32 | row``.  Shards have ranks by the priority of their sources, then by their order in
the pipeline, so that a number is smaller where the priority is higher, or the document comes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup.work_files import read_array, write_array
from data_prep.curate.pipeline.step import Doc, ShardRef, View

ROW_BITS = np.uint64(32)
ROW_MASK = np.uint64((1 << 32) - 1)
_OPEN_FILES = 64


class Numbering:
    """The ranks of a view's shards."""

    def __init__(self, view: View) -> None:
        self.shards = sorted(view.shards, key=lambda shard: -view.priority(shard.source))
        """All shards; a shard's place here is its rank."""
        self.rank_of = {shard: rank for rank, shard in enumerate(self.shards)}


def ranks(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rank of the shard that holds each document."""
    return (numbers >> ROW_BITS).astype(np.int64)


def rows(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the row of each document in its shard."""
    return (numbers & ROW_MASK).astype(np.int64)


class Register:
    """Row, length and id of the documents of each shard, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def write(self, rank: int, documents: Sequence[tuple[int, int, str]]) -> None:
        """Write a shard's documents: row, characters and id of each, in order."""
        ids = [id_.encode() for _, _, id_ in documents]
        width = max(map(len, ids), default=1)
        table = np.empty(len(ids), [("row", "<u4"), ("characters", "<u8"), ("id", f"S{width}")])
        for field, values in (("row", [r for r, _, _ in documents]),
                              ("characters", [c for _, c, _ in documents]), ("id", ids)):
            table[field] = values
        write_array(self._folder / f"{rank:06}.npy", table)

    def read(self, rank: int) -> NDArray[Any]:
        """Return a shard's documents: `row`, `characters`, `id`."""
        if rank not in self._open:
            self._open[rank] = read_array(self._folder / f"{rank:06}.npy")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(rank)
        return self._open[rank]

    def at(self, rank: int, wanted: NDArray[np.int64]) -> NDArray[Any]:
        """Return the records of rows of a shard."""
        table = self.read(rank)
        found: NDArray[Any] = table[np.searchsorted(table["row"], wanted)]
        return found

    def id_of(self, number: int) -> str:
        """Return a document's id."""
        raw: bytes = self.at(number >> 32, np.array([number & 0xFFFFFFFF]))["id"][0]
        return raw.decode()


def registered(view: View, shard: ShardRef, register: Register, rank: int) -> Iterator[list[Doc]]:
    """Yield a shard's documents in batches, and write down what they are when all have been."""
    known: list[tuple[int, int, str]] = []
    for batch in view.documents(shard):
        known += [(d.row, len(d.text), d.id) for d in batch]
        yield batch
    register.write(rank, known)
