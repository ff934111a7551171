"""Exact repeats over more documents than fit in memory: the steps `exact_dedup` and `paragraph_dedup`.

Of documents with one text the first of the source with the highest priority stays.  A paragraph that many
documents have, such as a menu or a notice, is cut out of them.  Both count keys of 128 bits: a shard's keys
are written sorted and cut into partitions by their first bits; a partition is counted in ranges of keys.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from blake3 import blake3
from numpy.typing import NDArray

from data_prep.curate.dedup.work_files import (
    Numbering, Records, Register, Slice, get_ranks, list_part_files, open_bucket, register_documents,
    write_buckets)
from data_prep.curate.pipeline.step import KEPT, Doc, Pass, ShardRef, Step, StepOutcome, View
from megatron_sov.base.artifacts import create_folder
from megatron_sov.base.documents.overlap import fold_text
from megatron_sov.base.settings import AtLeastOne, Share

KEY_BYTES = 16
OCCURRENCE = np.dtype([("key", f"S{KEY_BYTES}"), ("doc", "<u8")])
"""A key, and the number of a document that has it."""
SURPLUS = np.dtype([("doc", "<u8"), ("keeper", "<u8"), ("key", f"S{KEY_BYTES}")])
"""A document, the first one that has the key too, and the key that it has to give up."""
RANGE_RECORDS = 1 << 20
_HALF = np.uint64(32)


def compute_key_partitions(keys: NDArray[Any], num_partitions: int) -> NDArray[np.int64]:
    """Return the partition of each key; it does not fall where keys ascend."""
    # The upper 32 bits times the number of partitions, over 2^32: even shares without a division, and in the
    # order of the keys.
    return ((_heads(keys) >> _HALF) * np.uint64(num_partitions) >> _HALF).astype(np.int64)


def write_occurrences(path: Path, keys: list[bytes], numbers: list[int], num_partitions: int) -> None:
    """Write a shard's keys, each with its document's number; a document has a key once."""
    records = np.empty(len(keys), OCCURRENCE)
    records["key"], records["doc"] = keys, numbers
    # `lexsort` takes its last argument first: by key, then by document.
    records = records[np.lexsort((records["doc"], records["key"]))]
    write_buckets(path, records, compute_key_partitions(records["key"], num_partitions), num_partitions)


def write_surplus(files: list[Path], partition: int, folder: Path, max_documents: int = 1) -> None:
    """Find in one partition of all shards' keys the documents that have to give a key up.

    Args:
        files: what `write_occurrences` wrote, by rank.
        partition: number of the partition.
        folder: receives files with a bucket for each rank.
        max_documents: of a key that occurs in more documents, the first one alone keeps it.
    """
    slices = [open_bucket(file, OCCURRENCE, partition) for file in files]
    with create_folder(folder) as temporary:
        for number, block in enumerate(_blocks(_surplus(_ranges(slices), max_documents))):
            # By document: the next pass reads what goes shard by shard.
            block = block[np.lexsort((block["key"], block["doc"]))]
            write_buckets(temporary / f"{number:06}", block, get_ranks(block["doc"]), len(files))


def read_surplus(folder: Path, rank: int) -> Records:
    """Return what the documents of a shard have to give up, sorted by document; `folder`: with the folders of
    all partitions."""
    found = [open_bucket(file, SURPLUS, rank).read() for file in list_part_files(folder)]
    joined: Records = np.concatenate([np.empty(0, SURPLUS), *found])
    return joined[np.argsort(joined["doc"], kind="stable")]


def _heads(keys: NDArray[Any]) -> NDArray[np.uint64]:
    # Big-endian, so that numbers have the order of the bytes that the keys were sorted by.
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, KEY_BYTES // 8)[:, 0].astype(np.uint64)


def _ranges(slices: list[Slice]) -> Iterator[list[Slice]]:
    total = sum(part.num_records for part in slices)
    num_ranges = -(-total // RANGE_RECORDS)
    if num_ranges <= 1:
        yield slices
        return
    # Hashes are spread evenly, so equal ranges of keys hold about as many records each. Every slice is cut at
    # the same bounds: all records of one key come in one range. The last bound is above the highest key.
    heads = [_Heads(part) for part in slices if part.num_records]
    lowest = min(head.at(0) for head in heads)
    highest = max(head.at(head.part.num_records - 1) for head in heads)
    starts = [0] * len(heads)
    for number in range(1, num_ranges + 1):
        bound = lowest + (highest + 1 - lowest) * number // num_ranges
        stops = [head.first_from(bound, start) for head, start in zip(heads, starts, strict=True)]
        yield [head.part.part(start, stop)
               for head, start, stop in zip(heads, starts, stops, strict=True) if stop > start]
        starts = stops


@dataclass(frozen=True)
class _Heads:
    """The first bits of a slice's keys, read one by one."""

    part: Slice

    def at(self, place: int) -> int:
        return int(_heads(self.part.read(place, place + 1)["key"])[0])

    def first_from(self, bound: int, start: int) -> int:
        """Return the first place from `start` on whose key is not below a bound."""
        stop = self.part.num_records
        while start < stop:
            middle = (start + stop) // 2
            if self.at(middle) < bound:
                start = middle + 1
            else:
                stop = middle
        return start


def _surplus(ranges: Iterator[list[Slice]], max_documents: int) -> Iterator[Records]:
    for slices in ranges:
        keys, counts, firsts = _count(slices)
        often = counts > max_documents
        keys, firsts = keys[often], firsts[often]
        if not len(keys):
            continue
        for part in slices:
            records = part.read()
            # For a key above all others the place is behind the last: clipped, it fails the comparison that
            # follows.
            place = np.minimum(np.searchsorted(keys, records["key"]), len(keys) - 1)
            is_surplus = (keys[place] == records["key"]) & (firsts[place] != records["doc"])
            found = np.empty(int(is_surplus.sum()), SURPLUS)
            found["doc"], found["key"] = records["doc"][is_surplus], records["key"][is_surplus]
            found["keeper"] = firsts[place[is_surplus]]
            yield found


def _count(slices: list[Slice]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint64]]:
    """Return the keys of slices, in how many documents each occurs, and the number of the first."""
    keys = np.empty(0, OCCURRENCE["key"])
    counts, firsts = np.empty(0, np.int64), np.empty(0, np.uint64)
    # What was counted and the new block are merged by one sort, so memory holds one entry for a key and one
    # block of records, however often a key occurs.
    for block in _blocks(part.read() for part in slices):
        keys = np.concatenate([keys, block["key"]])
        counts = np.concatenate([counts, np.ones(len(block), np.int64)])
        firsts = np.concatenate([firsts, block["doc"]])
        order = np.argsort(keys, kind="stable")
        keys, counts, firsts = keys[order], counts[order], firsts[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        keys = keys[starts]
        counts, firsts = np.add.reduceat(counts, starts), np.minimum.reduceat(firsts, starts)
    return keys, counts, firsts


def _blocks(pieces: Iterator[Records]) -> Iterator[Records]:
    held: list[Records] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= RANGE_RECORDS:
            yield np.concatenate(held)
            held, count = [], 0
    if count:
        yield np.concatenate(held)


# Outcomes from a list of documents that go, each because of another one that stays.

class DuplicateFilter:
    """Which documents go; the list of one shard is in memory at a time."""

    def __init__(self, numbering: Numbering, register: Register, reason: str,
                 lists: Callable[[int], Records]) -> None:
        """`lists`: rank -> records with `doc` and `keeper` of what goes from a shard."""
        self._numbering, self._register, self._reason, self._lists = numbering, register, reason, lists
        self._rank = -1
        self._keeper_ids: dict[int, str] = {}

    def compute_outcomes(self, documents: Sequence[Doc]) -> list[StepOutcome]:
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_by_shard[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load(rank)
        keeper = self._keeper_ids.get(document.row)
        return KEPT if keeper is None else StepOutcome(self._reason, values={"duplicate_of": keeper})

    def _load(self, rank: int) -> None:
        records = self._lists(rank)
        self._keeper_ids = {}
        keepers = records["keeper"]
        # By the shards of those that stay: each shard's register is opened once and not for each document.
        for number in records[keepers.argsort(kind="stable")]:
            row, keeper = int(number["doc"]) & 0xFFFFFFFF, int(number["keeper"])
            self._keeper_ids[row] = self._register.get_document_id(keeper)
        assert (get_ranks(records["doc"]) == rank).all()
        self._rank = rank


REASON = "exact duplicate"


def _compared(text: str) -> bytes:
    """Return a text in Unicode's compatibility form (NFKC) with every run of blanks and line ends as one
    blank."""
    # A document may hold half of a surrogate pair, which strict UTF-8 refuses.
    return " ".join(unicodedata.normalize("NFKC", text).split()).encode(errors="surrogatepass")


Partitions = Annotated[int, Ge(1), Le(65536)]
"""Tasks of a second pass; a file each."""


@dataclass(frozen=True)
class ExactSettings:
    """What counts as the same text."""

    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""


class ExactDedup(Step):
    """Drops documents whose text stands elsewhere."""

    kind = "exact_dedup"
    added_columns = {"duplicate_of": "string"}
    Settings = ExactSettings
    settings: ExactSettings

    def list_passes(self) -> Sequence[Pass]:
        """Return: keys of each shard, then which documents go, by partition."""
        return [Pass("keys", self._write_keys), Pass("compare", self._compare, self.settings.partitions)]

    def load_inputs(self, view: View) -> None:
        numbering = Numbering(view)
        self._dropped = DuplicateFilter(numbering, Register(view.work_folder / "documents"), REASON,
                                lambda rank: read_surplus(view.work_folder / "duplicates", rank))

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return self._dropped.compute_outcomes(documents)

    def _write_keys(self, view: View, task: int) -> None:
        numbering, shard = Numbering(view), view.shards[task]
        rank = numbering.rank_by_shard[shard]
        keys: list[bytes] = []
        numbers: list[int] = []
        for batch in register_documents(view, shard, Register(view.work_folder / "documents"), rank):
            keys += [blake3(_compared(d.text)).digest(KEY_BYTES) for d in batch]
            numbers += [rank << 32 | d.row for d in batch]
        write_occurrences(view.work_folder / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _compare(self, view: View, task: int) -> None:
        files = [view.work_folder / "keys" / f"{rank:06}" for rank in range(len(view.shards))]
        write_surplus(files, task, view.work_folder / "duplicates" / f"{task:05}")


REPEATED_REASON = "mostly repeated paragraphs"


@dataclass(frozen=True)
class ParagraphSettings:
    """What is cut."""

    min_chars: AtLeastOne = 30
    """Shorter paragraphs stay; blanks at their ends do not count."""
    max_documents: AtLeastOne = 5
    """A paragraph that occurs in more documents than this is cut out of all but the first, that of the
    highest priority."""
    max_share: Share = 0.5
    """A document that loses more of its characters is dropped."""
    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of a text."""

    start: int
    """Where it begins, in characters."""
    stop: int
    """Where what parts it from the next one ends."""
    key: bytes
    """128 bits of it in one case, in Unicode's compatibility form, and with every run of blanks as one;
    empty: it is too short to be cut."""


def iter_paragraphs(text: str, min_chars: int) -> Iterator[Paragraph]:
    """Yield the lines of a text, all characters in one of them."""
    begin = 0
    # Neither folding makes or takes away a line's end: lines are folded together, for one call costs as much.
    for line, folded in zip(re.findall(r"[^\n]*\n|[^\n]+$", text), fold_text(text).split("\n"), strict=False):
        words, key = folded.split(), b""
        # The length of the words joined by blanks, known before they are joined: short lines cost no hash.
        if sum(map(len, words)) + len(words) - 1 >= min_chars:
            plain = " ".join(words).encode(errors="surrogatepass")
            key = hashlib.blake2b(plain, digest_size=KEY_BYTES).digest()
        yield Paragraph(begin, begin + len(line), key)
        begin += len(line)


class ParagraphDedup(Step):
    """Cuts paragraphs that many documents have."""

    kind = "paragraph_dedup"
    added_columns = {"paragraphs_cut": "int64"}
    Settings = ParagraphSettings
    settings: ParagraphSettings

    def list_passes(self) -> Sequence[Pass]:
        """Return: paragraphs of each shard, then those that are in too many documents, by partition."""
        return [Pass("paragraphs", self._write_keys), Pass("count", self._count, self.settings.partitions)]

    def load_inputs(self, view: View) -> None:
        self._numbering, self._folder = Numbering(view), view.work_folder / "repeated"
        self._rank = -1
        self._cut: dict[int, set[bytes]] = {}

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_by_shard[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load(rank)
        keys = self._cut.get(document.row)
        if keys is None:
            return StepOutcome(values={"paragraphs_cut": 0})
        parts = list(iter_paragraphs(document.text, self.settings.min_chars))
        stay = [p for p in parts if p.key not in keys]
        num_cut = len(parts) - len(stay)
        text = "".join(document.text[p.start:p.stop] for p in stay)
        # Blanks count on neither side of the share.
        lost = sum(len(document.text[p.start:p.stop].strip()) for p in parts if p.key in keys)
        if not text.strip() or lost > self.settings.max_share * len(document.text.strip()):
            return StepOutcome(REPEATED_REASON, values={"paragraphs_cut": num_cut})
        return StepOutcome(text=text, values={"paragraphs_cut": num_cut})

    def _load(self, rank: int) -> None:
        self._cut = {}
        for record in read_surplus(self._folder, rank):
            key = bytes(record["key"]).ljust(KEY_BYTES, b"\0")  # numpy takes zeros at the end for padding
            self._cut.setdefault(int(record["doc"]) & 0xFFFFFFFF, set()).add(key)
        self._rank = rank

    def _write_keys(self, view: View, task: int) -> None:
        shard = view.shards[task]
        rank = Numbering(view).rank_by_shard[shard]
        keys: list[bytes] = []
        numbers: list[int] = []
        for batch in view.iter_documents(shard):
            for document in batch:
                # A paragraph that a document repeats within itself counts as one document.
                found = {p.key for p in iter_paragraphs(document.text, self.settings.min_chars) if p.key}
                keys += sorted(found)
                numbers += [rank << 32 | document.row] * len(found)
        write_occurrences(view.work_folder / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _count(self, view: View, task: int) -> None:
        files = [view.work_folder / "keys" / f"{rank:06}" for rank in range(len(view.shards))]
        write_surplus(files, task, view.work_folder / "repeated" / f"{task:05}", self.settings.max_documents)
