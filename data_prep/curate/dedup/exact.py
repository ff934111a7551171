"""Steps `exact_dedup` and `paragraph_dedup`: drop repeated documents, cut repeated paragraphs.

Both count more 128-bit keys than fit into memory: a first pass writes the sorted keys for a shard, divided
into partitions by the first bits; a second pass counts a partition in ranges of keys.
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
    Numbering, Records, Register, Slice, compute_key_partitions, compute_partition_bounds, get_ranks,
    iter_key_ranges, join_blocks, list_part_files, open_bucket, register_documents, write_buckets)
from data_prep.curate.pipeline.step import KEPT, Doc, Pass, ShardRef, Step, StepOutcome, View
from megatron_sov.base.artifacts import create_folder
from megatron_sov.base.documents.overlap import fold_text
from megatron_sov.base.settings import AtLeastOne, Share

KEY_BYTES = 16
OCCURRENCE = np.dtype([("key", f"S{KEY_BYTES}"), ("doc", "<u8")])
"""A key and the number of a document with the key."""
SURPLUS = np.dtype([("doc", "<u8"), ("keeper", "<u8"), ("key", f"S{KEY_BYTES}")])
"""A document, the first document with the same key, and the key that `doc` loses."""
RANGE_RECORDS = 1 << 20
REASON = "exact duplicate"
REPEATED_REASON = "mostly repeated paragraphs"

Partitions = Annotated[int, Ge(1), Le(65536)]
"""Number of tasks in a second pass."""


@dataclass(frozen=True)
class ExactSettings:
    """Settings for `exact_dedup`."""

    partitions: Partitions = 64
    """Tasks in the second pass, which limit the workers."""


class ExactDedup(Step):
    """Drops documents whose normalized text equals an earlier document's, by source priority and order."""

    kind = "exact_dedup"
    added_columns = {"duplicate_of": "string"}
    Settings = ExactSettings
    settings: ExactSettings

    def list_passes(self) -> Sequence[Pass]:
        return [Pass("keys", self._write_keys), Pass("compare", self._compare_keys, self.settings.partitions)]

    def load_inputs(self, view: View) -> None:
        folder = view.work_folder / "duplicates"
        self._duplicates = DuplicateFilter(view, REASON, lambda rank: read_surplus(folder, rank))

    def judge_document(self, document: Doc) -> StepOutcome:
        return self._duplicates.judge_document(document)

    def _write_keys(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        keys: list[bytes] = []
        numbers: list[int] = []
        for document in register_documents(view, view.shards[task], rank):
            keys.append(blake3(_normalize_text(document.text)).digest(KEY_BYTES))
            numbers.append(rank << 32 | document.row)
        write_occurrences(view.work_folder / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _compare_keys(self, view: View, task: int) -> None:
        write_surplus(view, task, self.settings.partitions, view.work_folder / "duplicates")


def _normalize_text(text: str) -> bytes:
    """Encode `text` in NFKC, with single spaces for whitespace."""
    # Documents may hold lone surrogates, which strict UTF-8 refuses.
    return " ".join(unicodedata.normalize("NFKC", text).split()).encode(errors="surrogatepass")


class DuplicateFilter:
    """Drops listed documents; a single shard's list is in memory."""

    def __init__(self, view: View, reason: str, read_duplicates: Callable[[int], Records]) -> None:
        """`read_duplicates` maps a rank to records with `doc` (to drop) and `keeper`."""
        self._numbering, self._register = Numbering(view), Register(view.work_folder / "documents")
        self._reason, self._read_duplicates = reason, read_duplicates
        self._rank = -1
        self._keeper_ids: dict[int, str] = {}

    def judge_document(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_by_shard[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load_shard(rank)
        keeper = self._keeper_ids.get(document.row)
        return KEPT if keeper is None else StepOutcome(self._reason, values={"duplicate_of": keeper})

    def _load_shard(self, rank: int) -> None:
        records = self._read_duplicates(rank)
        self._keeper_ids = {}
        # Sorted by keeper: each shard's table is opened once.
        for record in records[records["keeper"].argsort(kind="stable")]:
            row, keeper = int(record["doc"]) & 0xFFFFFFFF, int(record["keeper"])
            self._keeper_ids[row] = self._register.get_document_id(keeper)
        assert (get_ranks(records["doc"]) == rank).all()
        self._rank = rank


@dataclass(frozen=True)
class ParagraphSettings:
    """Settings for `paragraph_dedup`."""

    min_chars: AtLeastOne = 30
    """Minimum characters in a paragraph to cut, without blanks at the ends."""
    max_documents: AtLeastOne = 5
    """A paragraph in more documents stays only in the first document by source priority."""
    max_share: Share = 0.5
    """A document that would lose a larger share is dropped."""
    partitions: Partitions = 64
    """Tasks in the second pass, which limit the workers."""


class ParagraphDedup(Step):
    """Cuts paragraphs in many documents, e.g. menus and notices, except from the first document."""

    kind = "paragraph_dedup"
    added_columns = {"paragraphs_cut": "int64"}
    Settings = ParagraphSettings
    settings: ParagraphSettings

    def list_passes(self) -> Sequence[Pass]:
        return [Pass("paragraphs", self._write_keys),
                Pass("count", self._count_keys, self.settings.partitions)]

    def load_inputs(self, view: View) -> None:
        self._numbering, self._folder = Numbering(view), view.work_folder / "repeated"
        self._rank = -1
        self._keys_by_row: dict[int, set[bytes]] = {}

    def judge_document(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_by_shard[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load_shard(rank)
        keys = self._keys_by_row.get(document.row)
        if keys is None:
            return StepOutcome(values={"paragraphs_cut": 0})
        remaining: list[str] = []
        num_cut = num_cut_chars = 0
        for paragraph in iter_paragraphs(document.text, self.settings.min_chars):
            content = document.text[paragraph.start:paragraph.stop]
            if paragraph.key in keys:
                num_cut += 1
                num_cut_chars += len(content.strip())
            else:
                remaining.append(content)
        text = "".join(remaining)
        # Both counts leave out surrounding blanks.
        if not text.strip() or num_cut_chars > self.settings.max_share * len(document.text.strip()):
            return StepOutcome(REPEATED_REASON, values={"paragraphs_cut": num_cut})
        return StepOutcome(text=text, values={"paragraphs_cut": num_cut})

    def _load_shard(self, rank: int) -> None:
        self._keys_by_row = {}
        for record in read_surplus(self._folder, rank):
            key = bytes(record["key"]).ljust(KEY_BYTES, b"\0")  # numpy strips trailing zero bytes
            self._keys_by_row.setdefault(int(record["doc"]) & 0xFFFFFFFF, set()).add(key)
        self._rank = rank

    def _write_keys(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        keys: list[bytes] = []
        numbers: list[int] = []
        for document in view.iter_documents(view.shards[task]):
            # A set: a paragraph repeated within a document counts once.
            paragraphs = iter_paragraphs(document.text, self.settings.min_chars)
            document_keys = {paragraph.key for paragraph in paragraphs if paragraph.key}
            keys += sorted(document_keys)
            numbers += [rank << 32 | document.row] * len(document_keys)
        write_occurrences(view.work_folder / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _count_keys(self, view: View, task: int) -> None:
        write_surplus(view, task, self.settings.partitions, view.work_folder / "repeated",
                      self.settings.max_documents)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph's position in a text, and its key."""

    start: int
    """First character."""
    stop: int
    """Character after the paragraph's line end."""
    key: bytes
    """128-bit hash over the case-folded NFKC form with single spaces; empty if the paragraph is too short."""


def iter_paragraphs(text: str, min_chars: int) -> Iterator[Paragraph]:
    """Yield the lines in `text`, including line ends, as paragraphs."""
    begin = 0
    # Folding neither adds nor removes line ends; one call for the text is as cheap as one for a line.
    for line, folded in zip(re.findall(r"[^\n]*\n|[^\n]+$", text), fold_text(text).split("\n"), strict=False):
        words, key = folded.split(), b""
        # Length with single spaces, computed before joining: short lines need no hash.
        if sum(map(len, words)) + len(words) - 1 >= min_chars:
            plain = " ".join(words).encode(errors="surrogatepass")
            key = hashlib.blake2b(plain, digest_size=KEY_BYTES).digest()
        yield Paragraph(begin, begin + len(line), key)
        begin += len(line)


def write_occurrences(path: Path, keys: list[bytes], numbers: list[int], num_partitions: int) -> None:
    """Write a shard's keys with document numbers, by partition."""
    records = np.empty(len(keys), OCCURRENCE)
    records["key"], records["doc"] = keys, numbers
    # `lexsort` sorts by its last argument first: by key, then by document.
    records = records[np.lexsort((records["doc"], records["key"]))]
    write_buckets(path, records, compute_key_partitions(records["key"], num_partitions), num_partitions)


def write_surplus(view: View, partition: int, num_partitions: int, output: Path,
                  max_documents: int = 1) -> None:
    """Write a partition's `SURPLUS` records, in files with a bucket for each rank.

    Args:
        view: `view.work_folder / "keys"` holds a file from `write_occurrences` for each rank.
        partition: partition to count.
        num_partitions: number of partitions.
        output: folder; receives a subfolder for the partition.
        max_documents: a key in more documents stays only in the first document.
    """
    num_ranks = len(view.shards)
    slices = [open_bucket(view.work_folder / "keys" / f"{rank:06}", OCCURRENCE, partition)
              for rank in range(num_ranks)]
    bounds = compute_partition_bounds(partition, num_partitions)
    surplus = _iter_surplus(iter_key_ranges(slices, *bounds, RANGE_RECORDS), max_documents)
    with create_folder(output / f"{partition:05}") as temporary:
        for number, block in enumerate(join_blocks(surplus, RANGE_RECORDS)):
            # Sorted by document, because the outcomes are read shard by shard.
            block = block[np.lexsort((block["key"], block["doc"]))]
            write_buckets(temporary / f"{number:06}", block, get_ranks(block["doc"]), num_ranks)


def read_surplus(folder: Path, rank: int) -> Records:
    """Read a shard's `SURPLUS` records from the partitions' subfolders, sorted by document."""
    parts = [open_bucket(file, SURPLUS, rank).read_records() for file in list_part_files(folder)]
    records: Records = np.concatenate([np.empty(0, SURPLUS), *parts])
    return records[np.argsort(records["doc"], kind="stable")]


def _iter_surplus(ranges: Iterator[list[Slice]], max_documents: int) -> Iterator[Records]:
    for slices in ranges:
        keys, counts, firsts = _count_keys(slices)
        is_frequent = counts > max_documents
        keys, firsts = keys[is_frequent], firsts[is_frequent]
        if not len(keys):
            continue
        for part in slices:
            records = part.read_records()
            # A key above the last frequent key is clipped to the last key and fails the comparison below.
            places = np.minimum(np.searchsorted(keys, records["key"]), len(keys) - 1)
            is_surplus = (keys[places] == records["key"]) & (firsts[places] != records["doc"])
            surplus = np.empty(int(is_surplus.sum()), SURPLUS)
            surplus["doc"], surplus["key"] = records["doc"][is_surplus], records["key"][is_surplus]
            surplus["keeper"] = firsts[places[is_surplus]]
            yield surplus


def _count_keys(slices: list[Slice]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint64]]:
    """Return distinct keys [n] in ascending order, with document counts and first documents."""
    keys = np.empty(0, OCCURRENCE["key"])
    counts, firsts = np.empty(0, np.int64), np.empty(0, np.uint64)
    # A sort merges each block into the counts: memory holds an entry per key and a block, however often a key
    # occurs.
    for block in join_blocks((part.read_records() for part in slices), RANGE_RECORDS):
        keys = np.concatenate([keys, block["key"]])
        counts = np.concatenate([counts, np.ones(len(block), np.int64)])
        firsts = np.concatenate([firsts, block["doc"]])
        order = np.argsort(keys, kind="stable")
        keys, counts, firsts = keys[order], counts[order], firsts[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        keys = keys[starts]
        counts, firsts = np.add.reduceat(counts, starts), np.minimum.reduceat(firsts, starts)
    return keys, counts, firsts
