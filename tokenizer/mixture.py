"""What text a tokenizer learns from: groups of inputs, their weights, and which pieces are seen how often.

Text is taken in pieces of at most `PIECE_BYTES`, cut at blank lines.  A group seen 2.3 times has all its
pieces twice, and a third time those whose hash lies below a bound that gives 0.3 of the group's bytes.  So
what is seen depends on the content alone, not on the order of files, and a smaller share is a
part of a larger one.  Files are read in units of work: each can be read by a process of its own, and is known
again by what it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.documents import (
    BadRecord, Document, FileSpan, RecordReading, cut_at_blank_lines, list_files, plan_units, read_documents,
    read_span)
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.work.processes.pool import map_in_processes

PIECE_BYTES = 20_000
NUM_BUCKETS = 1 << 16
"""Steps in which a share of a group is chosen."""
MIXTURES: dict[str, dict[str, float]] = {
    "solar-open": {"en": 40, "ko": 22, "code": 12, "math": 10, "multi": 8, "domain": 4},
    "k-exaone": {"en": 2, "ko": 3, "multi": 1},
}
"""Weights by bytes as published (arXiv 2601.07022, arXiv 2601.01739); Solar Open's are percents, 96 in all.
`multi` of K-EXAONE is Spanish, German, Japanese and Vietnamese."""
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SourceGroup:
    """Inputs of one language or domain."""

    name: str
    """For messages, the manifest and mixtures; an input without a name is called by its path."""
    paths: tuple[Path, ...]
    """Files and folders."""
    weight: float | None = None
    """Share relative to the other weighted groups; None: as it is."""


@dataclasses.dataclass(frozen=True)
class GroupSizes:
    """What a look through a group found."""

    num_documents: int
    """Documents with text."""
    num_bytes: int
    """UTF-8 bytes of their text."""
    bucket_bytes: NDArray[np.int64]
    """Bytes of the pieces whose hash begins with each value, [NUM_BUCKETS]."""


@dataclasses.dataclass(frozen=True)
class GroupShare:
    """How often the pieces of a group are seen."""

    whole: int
    """Times that every piece is seen."""
    buckets: int
    """Pieces whose hash begins with less are seen once more."""

    def times(self, bucket: int) -> int:
        """Return how often a piece is seen."""
        return self.whole + (bucket < self.buckets)


def parse_input(argument: str) -> SourceGroup:
    """Read `[name=]PATH[:weight]`.

    Raises:
        UserError: the weight is not a positive number.
    """
    # a path that exists is meant, whatever = and : it holds
    if argument and Path(argument).exists():
        return SourceGroup(argument, (Path(argument),))
    named = _NAMED.fullmatch(argument)
    rest = named[2] if named else argument
    if not rest.partition(":")[0]:
        raise UserError(f"--input {argument!r}: names no file or folder; write [NAME=]PATH[:WEIGHT]")
    weight = None
    head, colon, tail = rest.rpartition(":")
    # a colon may belong to the name of a file
    if colon and not Path(rest).exists():
        try:
            weight = float(tail)
        except ValueError:
            head = rest
        else:
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"--input {argument!r}: weight {tail} must be a positive number, "
                                f"e.g. {head}:2")
            rest = head
    return SourceGroup(named[1] if named else rest, (Path(rest),), weight)


def gather_groups(arguments: Sequence[str], mixture: str | None) -> list[SourceGroup]:
    """Return the groups of all `--input`, in the order of their names; `mixture`:
    a published one gives the weights.

    Raises:
        UserError: weights that contradict one another or the mixture.
    """
    found: dict[str, SourceGroup] = {}
    for argument in arguments:
        group = parse_input(argument)
        # several inputs may form one group: its weight is that of all together
        known = found.setdefault(group.name, dataclasses.replace(group, paths=()))
        if None not in (known.weight, group.weight) and known.weight != group.weight:
            raise UserError(f"--input {argument!r}: the group {group.name} has weight {known.weight:g} "
                            "already; a weight belongs to the whole group, so give it once")
        weight = group.weight if known.weight is None else known.weight
        if group.paths[0] in known.paths:
            raise UserError(f"--input {argument!r}: is given twice; use a weight to have it seen more often")
        found[group.name] = SourceGroup(group.name, known.paths + group.paths, weight)
    if mixture is not None:
        found = _apply_mixture(found, mixture)
    # by name: the order on the command line changes nothing that is learned
    return [found[name] for name in sorted(found)]


def _apply_mixture(groups: dict[str, SourceGroup], mixture: str) -> dict[str, SourceGroup]:
    """Give groups the weights of a published mixture."""
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
    """Return how often each group is to be seen.

    Groups without a weight are seen once.  The weighted ones share their own total of bytes in proportion to
    their weights, so the amount of text stays the same.
    """
    # groups without a weight stay out of the sum: they are seen once
    weighted = [(g.weight, s.num_bytes) for g, s in zip(groups, sizes, strict=True) if g.weight is not None]
    total_weight, total_bytes = sum(w for w, _ in weighted), sum(n for _, n in weighted)
    return [1.0 if g.weight is None else total_bytes * (g.weight / total_weight) / s.num_bytes
            for g, s in zip(groups, sizes, strict=True)]


def choose_share(sizes: GroupSizes, factor: float) -> GroupShare:
    """Return the share of a group that comes nearest to `factor` times its bytes,
    and holds at least one piece."""
    whole = math.floor(factor)
    # bytes of the pieces below each bucket; the nearest bound is taken, above or below
    bytes_below = np.concatenate(([0], np.cumsum(sizes.bucket_bytes)))
    buckets = int(np.argmin(np.abs(bytes_below - (factor - whole) * sizes.num_bytes)))
    # a share of nothing would make the group vanish
    if not whole and not bytes_below[buckets]:
        buckets = int(np.argmax(bytes_below > 0))
    return GroupShare(whole, buckets)


def count_share_bytes(sizes: GroupSizes, share: GroupShare) -> int:
    """Return the bytes that a share comes to."""
    return share.whole * sizes.num_bytes + int(sizes.bucket_bytes[: share.buckets].sum())


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """Text that is seen as a whole or not at all."""

    raw: bytes
    """At most `PIECE_BYTES` of it, in UTF-8."""
    bucket: int
    """First two bytes of its hash."""

    @property
    def text(self) -> str:
        return self.raw.decode()


def iter_pieces(document: Document) -> Iterator[TextPiece]:
    for text in document.texts():
        raw = text.encode()
        for piece in (raw,) if len(raw) <= PIECE_BYTES else cut_at_blank_lines([raw], PIECE_BYTES):
            # the hash of the content: the same piece is in the sample whatever file it stands in
            yield TextPiece(piece, int.from_bytes(hashlib.blake2b(piece, digest_size=2).digest(), "big"))


def build_group_facts(group: SourceGroup, sizes: GroupSizes, share: GroupShare) -> dict[str, Any]:
    """Return what the manifest says about a group."""
    return {"group": group.name, "paths": [str(p) for p in group.paths], "weight": group.weight,
            "num_documents": sizes.num_documents, "num_bytes": sizes.num_bytes,
            "seen_bytes": count_share_bytes(sizes, share)}


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
                # by time and place, not content: to hash terabytes would take as long as to count them
                changed_ns = span.file.stat().st_mtime_ns
            except OSError as e:
                raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                                "check the path and its permissions") from e
            facts.append([str(span.file.resolve()), changed_ns, span.start, span.stop, span.document_bytes])
        return _hash_facts(facts)

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
                    raise _locate_fault(span, item)


def _hash_facts(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _locate_fault(span: FileSpan, item: BadRecord) -> UserError:
    """Return the mistake with its place in the whole file, of which a span is a part."""
    try:
        # a span does not know its line number: the file is read from the start once more
        for _ in read_documents([span.file]):
            continue
    except UserError as e:
        return e
    return UserError(f"{span.file}: {item.reason}")


def plan_count_units(groups: list[SourceGroup], unit_bytes: int) -> list[CountUnit]:
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


def measure_groups(groups: list[SourceGroup], units: list[CountUnit], work: Path, workers: int,
                 progress: Callable[[int], object]) -> list[GroupSizes]:
    """Read everything once; returns the sizes of each group.  What an earlier command found in
    unchanged files is kept.

    Raises:
        UserError: bad input, or a group without text.
    """
    # named by all units: one changed file makes another name
    file = work / f"sizes-{_hash_facts([unit.key({}) for unit in units])}.npz"
    if file.exists():
        with np.load(file) as saved:
            documents, buckets = saved["documents"], saved["buckets"]
        progress(sum(unit.size_bytes for unit in units))
        return _build_group_sizes(groups, documents, buckets)

    def found() -> Iterator[UnitSizes]:
        for unit, sizes in zip(units, map_in_processes(_create_measurer, (), units, workers), strict=True):
            progress(unit.size_bytes)
            yield sizes

    together = add_group_sizes(groups, units, found())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, documents=[sizes.num_documents for sizes in together],
                        buckets=[sizes.bucket_bytes for sizes in together])
    write_atomically(file, buffer.getvalue())
    return together


def add_group_sizes(groups: list[SourceGroup], units: list[CountUnit],
                    unit_sizes: Iterable[UnitSizes]) -> list[GroupSizes]:
    """Add up the sizes of units.

    Raises:
        UserError: a group without text.
    """
    documents, buckets = np.zeros(len(groups), np.int64), np.zeros((len(groups), NUM_BUCKETS), np.int64)
    for unit, sizes in zip(units, unit_sizes, strict=True):
        documents[unit.group] += sizes.num_documents
        # only buckets that occur are kept for a unit: small units touch few of the many
        buckets[unit.group, sizes.buckets] += sizes.bytes_
    return _build_group_sizes(groups, documents, buckets)


def _build_group_sizes(groups: list[SourceGroup], documents: NDArray[np.int64],
           buckets: NDArray[np.int64]) -> list[GroupSizes]:
    for group, row in zip(groups, buckets, strict=True):
        if not row.any():
            paths = ", ".join(map(str, group.paths))
            raise UserError(f"--input {group.name}: {paths} holds no text; pass files with text in them, "
                            "or leave it out")
    return [GroupSizes(int(n), int(row.sum()), row) for n, row in zip(documents, buckets, strict=True)]


def _create_measurer() -> Callable[[CountUnit], UnitSizes]:
    return _measure_unit


def _measure_unit(unit: CountUnit) -> UnitSizes:
    sizes = np.zeros(NUM_BUCKETS, np.int64)
    num_documents = 0
    for document in unit.documents():
        num_documents += 1
        for piece in iter_pieces(document):
            sizes[piece.bucket] += len(piece.raw)
    return UnitSizes.of(num_documents, sizes)
