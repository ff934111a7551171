"""Group training inputs, weigh the groups and choose which pieces of their text are counted.

`iter_pieces` cuts documents at blank lines into pieces up to `PIECE_BYTES`.  A group with factor 2.3 counts
every piece twice, and the pieces in the lowest hash buckets, with 0.3 of the group's bytes, a third time.  So
the choice depends on content alone, not on file order, and a smaller share is a subset of a larger share.
Workers read files in a `CountUnit` each.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.documents import (
    BadRecord, Document, FileSpan, RecordReading, cut_at_blank_lines, list_files, plan_units, read_documents,
    read_span)
from megatron_sov.base.documents.rows import fix_records
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.work.processes.pool import map_in_processes

PIECE_BYTES = 20_000
NUM_BUCKETS = 1 << 16
"""Hash buckets; a share of a group ends at a bucket's bound."""
MIXTURES: dict[str, dict[str, float]] = {
    "solar-open": {"en": 40, "ko": 22, "code": 12, "math": 10, "multi": 8, "domain": 4},
    "k-exaone": {"en": 2, "ko": 3, "multi": 1}}
"""Published weights by bytes (arXiv 2601.07022, arXiv 2601.01739). The Solar Open weights are percents that
sum to 96. In the K-EXAONE mixture, `multi` means Spanish, German, Japanese and Vietnamese."""
_SLACK = 4
"""A `PieceSampler` holds up to this multiple of its byte limit before it drops pieces."""
_NAMED_INPUT = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SourceGroup:
    """Inputs for a language or domain."""

    name: str
    """Name in messages, manifest and mixtures; the path if the user typed no name."""
    paths: tuple[Path, ...]
    weight: float | None = None
    """Share relative to the other weighted groups. None: every piece is counted once."""


@dataclasses.dataclass(frozen=True)
class GroupSizes:
    """Text in a `SourceGroup`."""

    num_documents: int
    """Documents with text."""
    num_bytes: int
    """UTF-8 bytes."""
    bucket_bytes: NDArray[np.int64]
    """Piece bytes by hash bucket, [NUM_BUCKETS]."""


@dataclasses.dataclass(frozen=True)
class GroupShare:
    """Passes over a group's pieces."""

    full_passes: int
    """Passes over every piece."""
    num_buckets: int
    """Pieces in the first `num_buckets` buckets are counted once more."""

    def count_passes(self, bucket: int) -> int:
        return self.full_passes + 1 if bucket < self.num_buckets else self.full_passes


def parse_input(argument: str) -> SourceGroup:
    """Parse `[NAME=]PATH[:WEIGHT]`. Raises `UserError`: the weight is not a positive number."""
    # an existing path may contain = and :
    if argument and Path(argument).exists():
        return SourceGroup(argument, (Path(argument),))
    match = _NAMED_INPUT.fullmatch(argument)
    path = match[2] if match else argument
    if not path.partition(":")[0]:
        raise UserError(f"--input {argument!r}: names no file or folder; write [NAME=]PATH[:WEIGHT]")
    weight = None
    head, colon, tail = path.rpartition(":")
    # a colon may belong to the file name
    if colon and not Path(path).exists():
        try:
            weight = float(tail)
        except ValueError:
            head = path
        else:
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"--input {argument!r}: weight {tail} must be a positive number, "
                                f"e.g. {head}:2")
            path = head
    return SourceGroup(match[1] if match else path, (Path(path),), weight)


def gather_groups(arguments: Sequence[str], mixture: str | None) -> list[SourceGroup]:
    """Group the arguments of `--input` by name and return the groups sorted by name. `arguments`: see
    `parse_input`; `mixture`: a key of `MIXTURES`, which sets the weights. Raises `UserError`: a group has two
    weights, or the inputs do not fit the mixture."""
    groups: dict[str, SourceGroup] = {}
    for argument in arguments:
        group = parse_input(argument)
        previous = groups.get(group.name, dataclasses.replace(group, paths=()))
        if None not in (previous.weight, group.weight) and previous.weight != group.weight:
            raise UserError(f"--input {argument!r}: the group {group.name} has weight {previous.weight:g} "
                            "already; a weight belongs to the whole group, so give it once")
        weight = group.weight if previous.weight is None else previous.weight
        if group.paths[0] in previous.paths:
            raise UserError(f"--input {argument!r}: is given twice; use a weight to count it more often")
        groups[group.name] = SourceGroup(group.name, previous.paths + group.paths, weight)
    if mixture is not None:
        groups = _apply_mixture(groups, mixture)
    # sorted, so that the order on the command line does not change the result
    return [groups[name] for name in sorted(groups)]


def _apply_mixture(groups: dict[str, SourceGroup], mixture: str) -> dict[str, SourceGroup]:
    if mixture not in MIXTURES:
        raise UserError(f"--mixture {mixture!r}: does not exist{suggest_name(mixture, MIXTURES)} (mixtures: "
                        f"{', '.join(MIXTURES)})")
    weights = MIXTURES[mixture]
    for group in groups.values():
        if group.name not in weights:
            raise UserError(f"--mixture {mixture}: has no group {group.name!r} (groups: "
                            f"{', '.join(weights)}); name each input, e.g. "
                            f"--input {next(iter(weights))}=PATH")
        if group.weight is not None:
            raise UserError(f"--input {group.name}: has weight {group.weight:g}, but --mixture {mixture} "
                            "gives the weights; drop one of them")
    if missing := [name for name in weights if name not in groups]:
        raise UserError(f"--mixture {mixture}: has a group {missing[0]!r} that no input belongs to; "
                        f"add --input {missing[0]}=PATH, or give the weights yourself as --input "
                        "NAME=PATH:weight")
    return {name: dataclasses.replace(group, weight=weights[name]) for name, group in groups.items()}


def compute_repeats(groups: list[SourceGroup], sizes: list[GroupSizes]) -> list[float]:
    """Return the factor by which each group's bytes are multiplied.

    Groups without a weight have factor 1.  The weighted groups share the sum of their bytes in proportion to
    their weights, so the amount of text stays the same.
    """
    weights = [0.0 if group.weight is None else group.weight for group in groups]
    total_weight = sum(weights)
    total_bytes = sum(s.num_bytes for s, weight in zip(sizes, weights, strict=True) if weight)
    return [total_bytes * (weight / total_weight) / s.num_bytes if weight else 1.0
            for s, weight in zip(sizes, weights, strict=True)]


def choose_share(sizes: GroupSizes, factor: float) -> GroupShare:
    """Return the share whose bytes are nearest to `factor` times the group's, with at least one piece."""
    full_passes = math.floor(factor)
    # bytes of the pieces below each bucket
    bytes_below = np.concatenate(([0], np.cumsum(sizes.bucket_bytes)))
    num_buckets = int(np.argmin(np.abs(bytes_below - (factor - full_passes) * sizes.num_bytes)))
    # an empty share would make the group vanish
    if not full_passes and not bytes_below[num_buckets]:
        num_buckets = int(np.argmax(bytes_below > 0))
    return GroupShare(full_passes, num_buckets)


def count_share_bytes(sizes: GroupSizes, share: GroupShare) -> int:
    return share.full_passes * sizes.num_bytes + int(sizes.bucket_bytes[: share.num_buckets].sum())


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """Text that a share includes or excludes as a unit."""

    raw: bytes
    """UTF-8, at most `PIECE_BYTES`."""
    bucket: int
    """First two hash bytes."""

    @property
    def text(self) -> str:
        return self.raw.decode()


def iter_pieces(document: Document) -> Iterator[TextPiece]:
    for text in document.texts():
        raw = text.encode()
        for piece in (raw,) if len(raw) <= PIECE_BYTES else cut_at_blank_lines([raw], PIECE_BYTES):
            # a hash of the content, so that the choice does not depend on the file
            yield TextPiece(piece, int.from_bytes(hashlib.blake2b(piece, digest_size=2).digest(), "big"))


def build_group_facts(group: SourceGroup, sizes: GroupSizes, share: GroupShare) -> dict[str, Any]:
    """Return a group's entry in the manifest."""
    return {"group": group.name, "paths": [str(p) for p in group.paths], "weight": group.weight,
            "num_documents": sizes.num_documents, "num_bytes": sizes.num_bytes,
            "seen_bytes": count_share_bytes(sizes, share)}


@dataclasses.dataclass(frozen=True)
class CountUnit:
    """File spans for a worker task."""

    group: int
    """Group index."""
    spans: tuple[FileSpan, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(span.size_bytes for span in self.spans)

    def build_key(self, settings: dict[str, Any]) -> str:
        """Return a cache key that changes with the settings and with the modification time of a file. Raises
        `UserError`: a file no longer exists."""
        facts: list[Any] = [settings]
        for span in self.spans:
            try:
                # not by content: hashing terabytes would take as long as counting their words
                modified_ns = span.file.stat().st_mtime_ns
            except OSError as e:
                raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                                "check the path and its permissions") from e
            facts.append([str(span.file.resolve()), modified_ns, span.start, span.stop, span.document_bytes])
        return _hash_facts(facts)

    def iter_documents(self) -> Iterator[Document]:
        """Yield the documents with text. Raises `UserError`: a file cannot be read, is not UTF-8, or has a
        malformed record (line or row named)."""
        for span in self.spans:
            for item in read_span(span, RecordReading()):
                if isinstance(item, Document):
                    yield item
                elif item.code != "empty":
                    raise _locate_fault(span, item)


def _hash_facts(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _locate_fault(span: FileSpan, item: BadRecord) -> UserError:
    """Return the error with the line or row number in the file."""
    try:
        # a span does not know its first line number, so read the file again from the start
        for _ in read_documents([span.file]):
            continue
    except UserError as e:
        return UserError(e.sentence, fix_records(span.file, item.reason))
    return UserError(f"{span.file}: {item.reason}")


def plan_count_units(groups: list[SourceGroup], unit_bytes: int) -> list[CountUnit]:
    """Divide the files of all groups into units of about `unit_bytes` on disk. Raises `UserError`: a path
    does not exist or contains no text file."""
    return [CountUnit(number, spans) for number, group in enumerate(groups) for path in group.paths
            for spans in plan_units(list_files(path, print), unit_bytes)]


@dataclasses.dataclass(frozen=True)
class UnitSizes:
    """Text in a `CountUnit`, sparse because small units touch few buckets."""

    num_documents: int
    """Documents with text."""
    buckets: NDArray[np.int64]
    """Indices of buckets with pieces, rising."""
    num_bytes: NDArray[np.int64]
    """Piece bytes by `buckets`."""

    @staticmethod
    def from_bucket_bytes(num_documents: int, bucket_bytes: NDArray[np.int64]) -> "UnitSizes":
        """Compress dense bucket sizes, [NUM_BUCKETS]."""
        buckets = np.flatnonzero(bucket_bytes)
        return UnitSizes(num_documents, buckets, bucket_bytes[buckets])


def measure_groups(groups: list[SourceGroup], units: list[CountUnit], work: Path, workers: int,
                   progress: Callable[[int], object]) -> list[GroupSizes]:
    """Read all units and sum `GroupSizes`; cache the result in the folder `work`.

    `progress` receives the bytes on disk of each unit read. Raises `UserError`: a file cannot be read, or a
    group has no text.
    """
    # the keys of all units name the cache file, so a modified input is read again
    file = work / f"sizes-{_hash_facts([unit.build_key({}) for unit in units])}.npz"
    if file.exists():
        with np.load(file) as cached:
            documents, buckets = cached["documents"], cached["buckets"]
        progress(sum(unit.size_bytes for unit in units))
        return _build_group_sizes(groups, documents, buckets)

    def iter_unit_sizes() -> Iterator[UnitSizes]:
        for unit, sizes in zip(units, map_in_processes(_create_measurer, (), units, workers), strict=True):
            progress(unit.size_bytes)
            yield sizes

    group_sizes = add_group_sizes(groups, units, iter_unit_sizes())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, documents=[sizes.num_documents for sizes in group_sizes],
                        buckets=[sizes.bucket_bytes for sizes in group_sizes])
    write_atomically(file, buffer.getvalue())
    return group_sizes


def add_group_sizes(groups: list[SourceGroup], units: list[CountUnit],
                    unit_sizes: Iterable[UnitSizes]) -> list[GroupSizes]:
    """Sum `unit_sizes` by group. Raises `UserError`: a group has no text."""
    documents, buckets = np.zeros(len(groups), np.int64), np.zeros((len(groups), NUM_BUCKETS), np.int64)
    for unit, sizes in zip(units, unit_sizes, strict=True):
        documents[unit.group] += sizes.num_documents
        buckets[unit.group, sizes.buckets] += sizes.num_bytes
    return _build_group_sizes(groups, documents, buckets)


def _build_group_sizes(groups: list[SourceGroup], documents: NDArray[np.int64],
                       buckets: NDArray[np.int64]) -> list[GroupSizes]:
    for group, row in zip(groups, buckets, strict=True):
        if not row.any():
            paths = ", ".join(map(str, group.paths))
            raise UserError(f"--input {group.name}: {paths} holds no text; pass files with text, or leave "
                            "the input out")
    return [GroupSizes(int(n), int(row.sum()), row) for n, row in zip(documents, buckets, strict=True)]


def _create_measurer() -> Callable[[CountUnit], UnitSizes]:
    return _measure_unit


def _measure_unit(unit: CountUnit) -> UnitSizes:
    bucket_bytes = np.zeros(NUM_BUCKETS, np.int64)
    num_documents = 0
    for document in unit.iter_documents():
        num_documents += 1
        for piece in iter_pieces(document):
            bucket_bytes[piece.bucket] += len(piece.raw)
    return UnitSizes.from_bucket_bytes(num_documents, bucket_bytes)


class PieceSampler:
    """Collects the pieces in the lowest hash buckets, before the size of their group is known.

    The sample contains every `GroupShare` up to `limit_bytes` (see `choose_share`)."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[TextPiece] = []
        self._size_bytes, self._drop_at_bytes = 0, _SLACK * limit_bytes
        self._highest_bucket: float = float("inf")

    def add_piece(self, piece: TextPiece) -> None:
        """Add a piece unless its bucket is above the limit."""
        # the bytes in the lower buckets only grow, so dropped buckets stay dropped
        if piece.bucket <= self._highest_bucket:
            self._pieces.append(piece)
            self._size_bytes += len(piece.raw)
            if self._size_bytes > self._drop_at_bytes:
                self._drop_pieces()

    def _drop_pieces(self) -> None:
        """Drop buckets above the limit, but not the bucket that crosses it: a share may end after it."""
        pieces: list[TextPiece] = []
        self._size_bytes = 0
        by_bucket = sorted(self._pieces, key=attrgetter("bucket"))
        for bucket, group in itertools.groupby(by_bucket, attrgetter("bucket")):
            if self._size_bytes > self._limit_bytes:
                break
            self._highest_bucket = bucket
            start = len(pieces)
            pieces += group
            self._size_bytes += sum(len(piece.raw) for piece in pieces[start:])
        self._pieces = pieces
        # sort rarely; a single bucket may exceed the limit, hence the second bound
        self._drop_at_bytes = max(_SLACK * self._limit_bytes, 2 * self._size_bytes)

    def get_pieces(self) -> list[TextPiece]:
        self._drop_pieces()
        return self._pieces
