"""Reading the inputs in units of work: each can be read by a process of its own,
and is known again by what it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import atomic_write
from megatron_sov.base.documents import (
    BadRecord, Document, FileSpan, RecordReading, list_files, plan_units, read_documents, read_span)
from megatron_sov.base.errors import UserError
from megatron_sov.work.processes.pool import in_processes
from tokenizer.mixture import NUM_BUCKETS, Sizes, SourceGroup, pieces


@dataclasses.dataclass(frozen=True)
class CountUnit:
    """Spans of one group that are read together."""

    group: int
    """Number of the group."""
    spans: tuple[FileSpan, ...]
    """What is read."""

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(span.size_bytes for span in self.spans)

    def key(self, settings: dict[str, Any]) -> str:
        """Return a name for what comes of the unit under some settings: new when a file was written since.

        Raises:
            UserError: a file is gone.
        """
        facts: list[Any] = [settings]
        for span in self.spans:
            try:
                changed_ns = span.file.stat().st_mtime_ns
            except OSError as e:
                raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                                "check the path and its permissions") from e
            facts.append([str(span.file.resolve()), changed_ns, span.start, span.stop, span.document_bytes])
        return _digest(facts)

    def documents(self) -> Iterator[Document]:
        """Yield the documents with text.

        Raises:
            UserError: a file cannot be read, is not UTF-8, or has a malformed record (named by line or row).
        """
        for span in self.spans:
            for item in read_span(span, RecordReading()):
                if isinstance(item, Document):
                    yield item
                elif item.code != "empty":
                    raise _placed(span, item)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _placed(span: FileSpan, item: BadRecord) -> UserError:
    """Return the mistake with its place in the whole file, of which a span is a part."""
    try:
        for _ in read_documents([span.file]):
            continue
    except UserError as e:
        return e
    return UserError(f"{span.file}: {item.reason}")


def plan(groups: list[SourceGroup], unit_bytes: int) -> list[CountUnit]:
    """Return the units of all groups, of about `unit_bytes` on the disk.

    Raises:
        UserError: a path does not exist or holds no text file.
    """
    return [CountUnit(number, spans) for number, group in enumerate(groups) for path in group.paths
            for spans in plan_units(list_files(path, print), unit_bytes)]


@dataclasses.dataclass(frozen=True)
class UnitSizes:
    """How much text a unit holds."""

    num_documents: int
    """Documents with text."""
    buckets: NDArray[np.int64]
    """Buckets that occur, rising."""
    bytes_: NDArray[np.int64]
    """Bytes of the pieces in each."""

    @staticmethod
    def of(num_documents: int, bucket_bytes: NDArray[np.int64]) -> UnitSizes:
        """Return the sizes, given the bytes of the pieces in all buckets."""
        buckets = np.flatnonzero(bucket_bytes)
        return UnitSizes(num_documents, buckets, bucket_bytes[buckets])


def look_through(groups: list[SourceGroup], units: list[CountUnit], work: Path, workers: int,
                 progress: Callable[[int], object]) -> list[Sizes]:
    """Read everything once; returns the sizes of each group.  What an earlier command found in
    unchanged files is kept.

    Raises:
        UserError: bad input, or a group without text.
    """
    file = work / f"sizes-{_digest([unit.key({}) for unit in units])}.npz"
    if file.exists():
        with np.load(file) as saved:
            documents, buckets = saved["documents"], saved["buckets"]
        progress(sum(unit.size_bytes for unit in units))
        return _sizes(groups, documents, buckets)

    def found() -> Iterator[UnitSizes]:
        for unit, sizes in zip(units, in_processes(_looker, (), units, workers), strict=True):
            progress(unit.size_bytes)
            yield sizes

    together = group_sizes(groups, units, found())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, documents=[sizes.num_documents for sizes in together],
                        buckets=[sizes.bucket_bytes for sizes in together])
    atomic_write(file, buffer.getvalue())
    return together


def group_sizes(groups: list[SourceGroup], units: list[CountUnit], found: Iterable[UnitSizes]) -> list[Sizes]:
    """Add up the sizes of units.

    Raises:
        UserError: a group without text.
    """
    documents, buckets = np.zeros(len(groups), np.int64), np.zeros((len(groups), NUM_BUCKETS), np.int64)
    for unit, sizes in zip(units, found, strict=True):
        documents[unit.group] += sizes.num_documents
        buckets[unit.group, sizes.buckets] += sizes.bytes_
    return _sizes(groups, documents, buckets)


def _sizes(groups: list[SourceGroup], documents: NDArray[np.int64],
           buckets: NDArray[np.int64]) -> list[Sizes]:
    for group, row in zip(groups, buckets, strict=True):
        if not row.any():
            paths = ", ".join(map(str, group.paths))
            raise UserError(f"--input {group.name}: {paths} holds no text; pass files with text in them, "
                            "or leave it out")
    return [Sizes(int(n), int(row.sum()), row) for n, row in zip(documents, buckets, strict=True)]


def _looker() -> Callable[[CountUnit], UnitSizes]:
    return _look


def _look(unit: CountUnit) -> UnitSizes:
    sizes = np.zeros(NUM_BUCKETS, np.int64)
    num_documents = 0
    for document in unit.documents():
        num_documents += 1
        for piece in pieces(document):
            sizes[piece.bucket] += len(piece.raw)
    return UnitSizes.of(num_documents, sizes)
