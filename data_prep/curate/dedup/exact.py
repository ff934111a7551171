"""Step `exact_dedup`: drop repeated documents.

The step counts more 128-bit keys than fit into memory: a first pass writes the keys for a shard, divided into
partitions by the first bits; a task in the second pass counts a partition in memory.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from blake3 import blake3

from data_prep.curate.dedup.work_files import (
    Numbering, Records, Register, compute_key_partitions, find_group_begins, get_ranks, list_part_files,
    read_bucket, read_partition, register_documents, write_buckets)
from data_prep.curate.pipeline.step import KEPT, Doc, Pass, ShardRef, Step, StepOutcome, View

KEY_BYTES = 16
OCCURRENCE = np.dtype([("key", f"S{KEY_BYTES}"), ("doc", "<u8")])
"""A key and the number of a document with the key."""
SURPLUS = np.dtype([("doc", "<u8"), ("keeper", "<u8")])
"""A document, and the first document with the same key."""
REASON = "exact duplicate"

Partitions = Annotated[int, Ge(1), Le(65536)]
"""Number of tasks in a second pass; a task holds its share of the keys in memory."""


@dataclass(frozen=True)
class ExactSettings:
    """Settings for `exact_dedup`."""

    partitions: Partitions = 64
    """Tasks in the second pass, which limit the workers; a task holds its share of the keys in memory."""


class ExactDedup(Step):
    """Drops documents whose normalized text equals an earlier document's, by source priority and order."""

    kind = "exact_dedup"
    version = 3  # a file of duplicates per partition
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


def write_occurrences(path: Path, keys: list[bytes], numbers: list[int], num_partitions: int) -> None:
    """Write a shard's keys with document numbers, by partition."""
    records = np.empty(len(keys), OCCURRENCE)
    records["key"], records["doc"] = keys, numbers
    # `lexsort` sorts by its last argument first: by key, then by document.
    records = records[np.lexsort((records["doc"], records["key"]))]
    write_buckets(path, records, compute_key_partitions(records["key"], num_partitions), num_partitions)


def write_surplus(view: View, partition: int, num_partitions: int, output: Path) -> None:
    """Write a partition's `SURPLUS` records to a file in the folder `output`, with a bucket for each rank;
    `view.work_folder / "keys"` holds a file from `write_occurrences` for each rank."""
    num_ranks = len(view.shards)
    files = [view.work_folder / "keys" / f"{rank:06}" for rank in range(num_ranks)]
    records = read_partition(files, OCCURRENCE, partition, num_partitions)
    records = records[np.lexsort((records["doc"], records["key"]))]
    firsts = find_group_begins(records["key"])
    is_surplus = firsts < np.arange(len(records))
    surplus = np.empty(int(is_surplus.sum()), SURPLUS)
    surplus["doc"], surplus["keeper"] = records["doc"][is_surplus], records["doc"][firsts[is_surplus]]
    # Sorted by document, because the outcomes are read shard by shard.
    surplus = surplus[np.argsort(surplus["doc"], kind="stable")]
    write_buckets(output / f"{partition:05}", surplus, get_ranks(surplus["doc"]), num_ranks)


def read_surplus(folder: Path, rank: int) -> Records:
    """Read a shard's `SURPLUS` records from the partitions' files, sorted by document."""
    records = np.concatenate([read_bucket(file, SURPLUS, rank) for file in list_part_files(folder)])
    return records[np.argsort(records["doc"], kind="stable")]
