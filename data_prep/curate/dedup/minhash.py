"""Step `minhash_dedup`: drop a document if a kept document is nearly the same.

MinHash signatures (Broder, 1997) with locality-sensitive hashing: a number in a signature is the minimum over
the shingles' images under a permutation ``x -> a x + b`` on 32 bits with odd `a`; two texts agree in a number
with a probability equal to the Jaccard similarity. With b bands and r numbers per band, texts with similarity
s share a band with probability ``1 - (1 - s^r)^b``. Pairs with a common band are compared by exact
similarity.

Passes: signatures (per shard), common bands (per partition), shingles and exact comparison (per shard), and
selection (`clusters`, one task).
"""

import mmap
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from data_prep.curate.dedup.clusters import DROPPED, EDGE, Clusters, DocumentOrder, sort_edges
from data_prep.curate.dedup.exact import DuplicateFilter, Partitions
from data_prep.curate.dedup.minhash_loops import count_common, hash_bands, lower_signature
from data_prep.curate.dedup.work_files import (
    ROW_MASK, Numbering, Records, Register, compute_key_partitions, find_group_begins, get_ranks, get_rows,
    list_part_files, read_bucket, read_partition, register_documents, write_array, write_buckets)
from data_prep.curate.pipeline.step import Doc, Pass, Step, StepOutcome, View
from data_prep.damaged_files import explain_deletion
from megatron_sov.base.artifacts import create_file
from megatron_sov.base.documents.overlap import find_units, hash_stretches
from megatron_sov.base.sealed import SEAL_PLACEHOLDER, check_seal, seal_file
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, ProblemCode, SettingsProblem

REASON = "near duplicate"
MAX_FIRST_DOCUMENTS = 12
"""Documents in a band that every document in the band is compared with."""
MAX_SIGNATURE_NUMBERS = 1024
PAIR_BLOCK = 1 << 18
PAIR = np.dtype([("own", "<u8"), ("other", "<u8")])
"""Numbers of two documents."""
BAND = np.dtype([("key", "<u8"), ("doc", "<u8"), ("characters", "<u4")])
"""A band's key, and the document's number and length in characters."""


@dataclass(frozen=True)
class MinhashSettings:
    """Settings for `minhash_dedup`."""

    threshold: Annotated[float, Gt(0), Le(1)] = 0.8
    """Minimum Jaccard similarity between near duplicates' shingles."""
    num_bands: AtLeastOne = 20
    """Bands in a signature; documents with a common band are compared."""
    rows_per_band: AtLeastOne = 6
    """Numbers in a band: more numbers make a common band depend more steeply on similarity."""
    ngram: Annotated[int, Ge(1), Le(1000)] = 5
    """Words of a shingle; a Thai, Chinese or Japanese character counts 1/4, a Korean syllable 1/3."""
    seed: NotNegativeInt = 0
    """Seed for the permutations."""
    partitions: Partitions = 64
    """Tasks in the second pass, which limit the workers; a task holds its share of the bands in memory."""

    def problems(self) -> list[SettingsProblem]:
        numbers = self.num_bands * self.rows_per_band
        if numbers <= MAX_SIGNATURE_NUMBERS:
            return []
        return [SettingsProblem(
            ProblemCode.RULE, "num_bands",
            f"makes {numbers:,} numbers with rows_per_band = {self.rows_per_band}; "
            f"must be at most {MAX_SIGNATURE_NUMBERS}", self.num_bands)]


class MinhashDedup(Step):
    """Drops documents similar to a kept document; the column `duplicate_of` names the kept document."""

    kind = "minhash_dedup"
    version = 4  # a file of pairs per partition
    added_columns = {"duplicate_of": "string"}
    Settings = MinhashSettings
    settings: MinhashSettings

    def list_passes(self) -> Sequence[Pass]:
        return [Pass("signatures", self._sign_documents),
                Pass("bands", self._pair_documents, self.settings.partitions),
                Pass("shingles", self._write_shingles), Pass("verify", self._verify_pairs),
                Pass("clusters", self._select_documents, 1)]

    def load_inputs(self, view: View) -> None:
        file = view.work_folder / "dropped"
        self._duplicates = DuplicateFilter(view, REASON, lambda rank: read_bucket(file, DROPPED, rank))

    def judge_document(self, document: Doc) -> StepOutcome:
        return self._duplicates.judge_document(document)

    def _sign_documents(self, view: View, task: int) -> None:
        signer = MinhashSigner(self.settings)
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        numbers: list[int] = []
        lengths: list[int] = []
        signatures: list[Signature] = []
        for document in register_documents(view, view.shards[task], rank):
            signature = signer.compute_signature(document.text)
            if signature is not None:
                numbers.append(rank << 32 | document.row)
                lengths.append(len(document.text))
                signatures.append(signature)
        records = np.empty((len(signatures), self.settings.num_bands), BAND)
        records["key"] = signer.compute_band_keys(signatures)
        records["doc"] = np.array(numbers, np.uint64)[:, None]
        records["characters"] = np.array(lengths, np.uint64)[:, None]
        write_bands(view.work_folder / "bands" / f"{rank:06}", records.reshape(-1), self.settings.partitions)

    def _pair_documents(self, view: View, task: int) -> None:
        num_ranks = len(view.shards)
        files = [view.work_folder / "bands" / f"{rank:06}" for rank in range(num_ranks)]
        bands = read_partition(files, BAND, task, self.settings.partitions)
        write_pairs(view.work_folder / "pairs" / f"{task:05}", pair_documents(bands, DocumentOrder(view)),
                    num_ranks)

    def _write_shingles(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        rows = np.unique(read_pairs(view.work_folder / "pairs", rank)[:, 0] & ROW_MASK).astype(np.int64)
        documents = view.iter_documents(view.shards[task])
        write_shingle_sets(view.work_folder / "shingles" / f"{rank:06}", documents, rows, self.settings.ngram)

    def _verify_pairs(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        order, register = DocumentOrder(view), Register(view.work_folder / "documents")
        pairs = read_pairs(view.work_folder / "pairs", rank)
        edges = [np.empty(0, EDGE)]
        for block in iter_similar_pairs(pairs, view.work_folder / "shingles", rank, self.settings.threshold):
            if not len(block):
                continue
            # A block has pairs between the same two shards.
            lengths = [register.find_rows(int(get_ranks(side[:1])[0]), get_rows(side))["characters"]
                       for side in block.T]
            edges.append(order.build_edges(block, np.stack(lengths, axis=1)))
        write_array(view.work_folder / "similar" / f"{rank:06}.npy", sort_edges(np.concatenate(edges)))

    def _select_documents(self, view: View, task: int) -> None:
        scratch = view.work_folder / ".clusters"
        shutil.rmtree(scratch, ignore_errors=True)
        clusters = Clusters(view, Register(view.work_folder / "documents"), scratch)
        clusters.select_documents(list_part_files(view.work_folder / "similar"))
        clusters.write_dropped(view.work_folder / "dropped")
        # Last, and without `similar`: a task killed here runs again from `similar` alone.
        for folder in (scratch, view.work_folder / "bands", view.work_folder / "shingles"):
            shutil.rmtree(folder, ignore_errors=True)


Signature = NDArray[np.uint32]


class MinhashSigner:
    """Computes MinHash signatures and band keys."""

    def __init__(self, settings: MinhashSettings) -> None:
        generator = np.random.Generator(np.random.PCG64(settings.seed))
        count = settings.num_bands * settings.rows_per_band
        # Only odd factors give permutations modulo 2^32.
        self._factors = generator.integers(0, 1 << 32, count, np.uint32) | np.uint32(1)
        self._terms = generator.integers(0, 1 << 32, count, np.uint32)
        self._num_bands, self._words = settings.num_bands, settings.ngram

    def compute_signature(self, text: str) -> Signature | None:
        """Return the signature for `text`, uint32 [bands x rows], or None if `text` has no words."""
        shingles = _hash_shingles(text, self._words)
        if not len(shingles):
            return None
        signature = np.full(len(self._factors), 0xFFFFFFFF, np.uint32)
        # Upper halves of 64-bit hashes: 32-bit permutations are faster and precise enough for estimates.
        lower_signature((shingles >> np.uint64(32)).astype(np.uint32), self._factors, self._terms, signature)
        return signature

    def compute_band_keys(self, signatures: list[Signature]) -> NDArray[np.uint64]:
        """Return band keys, uint64 [num_signatures, bands]."""
        keys = np.empty((len(signatures), self._num_bands), np.uint64)
        hash_bands(np.array(signatures, np.uint32).reshape(-1, len(self._factors)), keys)
        return keys


def compute_shingles(text: str, words: int) -> NDArray[np.uint64]:
    """Return distinct hashes in ascending order for runs of `words` words; a shorter text is a single run."""
    return np.unique(_hash_shingles(text, words))


def _hash_shingles(text: str, words: int) -> NDArray[np.uint64]:
    units = find_units(text)
    shingles = units.runs(words)
    if len(shingles) or not len(units.hashes):
        return shingles
    return hash_stretches(units.hashes, np.array([0]), np.array([len(units.hashes)]))


def write_bands(path: Path, records: Records, num_partitions: int) -> None:
    records = records[np.argsort(records["key"], kind="stable")]
    write_buckets(path, records, compute_key_partitions(records["key"], num_partitions), num_partitions)


def pair_documents(bands: Records, order: DocumentOrder) -> NDArray[np.uint64]:
    """Pair documents with a common band; return their numbers [n, 2].

    n documents with a common band have n^2 pairs, so a document is paired only with the band's first
    `MAX_FIRST_DOCUMENTS` documents in the order of selection.
    """
    places = order.compute_places(bands["doc"], bands["characters"])
    bands = bands[np.lexsort((bands["doc"], places, bands["key"]))]
    is_new = np.ones(len(bands), np.bool_)
    is_new[1:] = (bands["key"][1:] != bands["key"][:-1]) | (bands["doc"][1:] != bands["doc"][:-1])
    bands = bands[is_new]
    positions = np.arange(len(bands))
    begins = find_group_begins(bands["key"])
    pairs = [np.empty((0, 2), np.int64)]
    for first in range(min(MAX_FIRST_DOCUMENTS, int((positions - begins).max(initial=0)))):
        later = positions[positions - begins > first]
        pairs.append(np.stack([later, begins[later] + first], axis=1))
    numbers: NDArray[np.uint64] = bands["doc"][np.concatenate(pairs)]
    return numbers


def write_pairs(file: Path, pairs: NDArray[np.uint64], num_ranks: int) -> None:
    """Write every pair [n, 2] for both documents' shards."""
    # Both shards write shingles for their own documents.
    both = sort_distinct_pairs(np.concatenate([pairs, pairs[:, ::-1]]))
    records = np.empty(len(both), PAIR)
    records["own"], records["other"] = both[:, 0], both[:, 1]
    write_buckets(file, records, get_ranks(records["own"]), num_ranks)


def read_pairs(folder: Path, rank: int) -> NDArray[np.uint64]:
    """Read a shard's pairs [n, 2] from the partitions' files: own document first, ascending."""
    records = np.concatenate([read_bucket(file, PAIR, rank) for file in list_part_files(folder)])
    return sort_distinct_pairs(np.stack([records["own"], records["other"]], axis=1))


def sort_distinct_pairs(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sort pairs [n, 2] and remove repetitions, several times faster than `np.unique` over rows."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    is_new = np.ones(len(pairs), np.bool_)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[is_new]


class ShingleSets:
    """A shard's shingles for candidate documents, mapped from a file by `write_shingle_sets`."""

    def __init__(self, file: Path) -> None:
        check_seal(file, explain_deletion(file))
        with open(file, "rb") as f:  # copy on write: compiled loops need writable arrays
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        words = np.frombuffer(mapped, np.uint64, (len(mapped) - len(SEAL_PLACEHOLDER)) // np.uint64().nbytes)
        # Layout from the end: number n of rows, n + 1 begins, n rows.
        num_rows = int(words[-1])
        self.shingles: NDArray[np.uint64] = words[:-2 * num_rows - 2]
        self.rows, self.begins = np.split(words[-2 * num_rows - 2:-1].view(np.int64), [num_rows])


def write_shingle_sets(file: Path, documents: Iterator[Doc], rows: NDArray[np.int64], words: int) -> None:
    """Write shingles for the documents in `rows`, for `ShingleSets`.

    A single file, because every comparison task opens all shards' files.
    """
    wanted_rows = set(rows.tolist())
    begins = [0]
    with create_file(file, create_parents=True) as temporary, open(temporary, "wb") as f:
        for document in documents:
            if document.row in wanted_rows:
                shingles = compute_shingles(document.text, words)
                shingles.tofile(f)
                begins.append(begins[-1] + len(shingles))
        np.array([*np.sort(rows).tolist(), *begins, len(rows)], np.uint64).tofile(f)
        seal_file(temporary)


def iter_similar_pairs(pairs: NDArray[np.uint64], folder: Path, rank: int, threshold: float
                       ) -> Iterator[NDArray[np.uint64]]:
    """Yield a shard's pairs [n, 2] with a Jaccard similarity of at least `threshold`.

    Args:
        pairs: pairs from `read_pairs`.
        folder: files from `write_shingle_sets` by rank.
        rank: the shard's rank.
        threshold: in (0, 1].
    """
    # Both shards list a pair: the larger number's shard compares.
    pairs = pairs[pairs[:, 0] > pairs[:, 1]]
    own = ShingleSets(folder / f"{rank:06}")
    for other_rank in np.unique(get_ranks(pairs[:, 1])).tolist():
        other = ShingleSets(folder / f"{other_rank:06}")
        chosen = pairs[get_ranks(pairs[:, 1]) == other_rank]
        for start in range(0, len(chosen), PAIR_BLOCK):
            block = chosen[start:start + PAIR_BLOCK]
            places = np.stack([np.searchsorted(own.rows, get_rows(block[:, 0])),
                               np.searchsorted(other.rows, get_rows(block[:, 1]))], axis=1)
            common = np.empty(len(block), np.int64)
            count_common(own.shingles, own.begins, other.shingles, other.begins, places, common)
            sizes = np.diff(own.begins)[places[:, 0]] + np.diff(other.begins)[places[:, 1]]
            # common / (|a| + |b| - common) >= threshold, without the division.
            yield block[common >= threshold * (sizes - common)]
