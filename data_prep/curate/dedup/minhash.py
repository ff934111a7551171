"""Step `minhash_dedup`: a document goes if a kept one is nearly the same.

signatures (per shard) -> bands in common (per partition) -> shingles and their comparison (per shard, where
candidates are verified exactly) -> selection (`clusters`, one task).
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from data_prep.curate.dedup.clusters import DROPPED, EDGE, Clusters, DocumentOrder, sort_edges
from data_prep.curate.dedup.exact import DuplicateFilter, Partitions
from data_prep.curate.dedup.work_files import (
    Numbering, Records, Register, Slice, get_ranks, get_rows, list_part_files, open_bucket,
    register_documents, save_array, write_buckets)
from data_prep.curate.pipeline.step import Doc, Pass, Step, StepOutcome, View
from data_prep.damaged_files import explain_deletion, get_place_in_run
from megatron_sov.base.artifacts import create_file, create_folder
from megatron_sov.base.documents.overlap import Units, find_units, hash_stretches
from megatron_sov.base.sealed import SEAL_PLACEHOLDER, check_seal, seal_file
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, ProblemCode, SettingsProblem

# Documents that have a band in common: found in memory that does not grow with the corpus.
#
# As for exact keys (`dedup.exact`), a shard's bands are written sorted and cut into partitions, and a
# partition is worked through in ranges of keys. Of a band that many documents share, each is paired with the
# first `MOST_FIRST` only, as all pairs of a crowd of n would be n^2. First are those that come first in the
# order of keeping (`clusters.DocumentOrder`): they stay, and the crowd has to be compared with what stays.

MAX_FIRST_DOCUMENTS = 12
RANGE_RECORDS = 1 << 17
PAIR = np.dtype([("own", "<u8"), ("other", "<u8")])
"""Numbers of two documents."""
BAND = np.dtype([("key", "<u8"), ("doc", "<u8"), ("characters", "<u4")])
"""A band of a document's signature: its key, number and characters of the document."""
_HALF = np.uint64(32)


def write_bands(path: Path, records: Records, num_partitions: int) -> None:
    records = records[np.argsort(records["key"], kind="stable")]
    partitions = ((records["key"] >> _HALF) * np.uint64(num_partitions) >> _HALF).astype(np.int64)
    write_buckets(path, records, partitions, num_partitions)


def iter_band_pairs(files: list[Path], order: DocumentOrder, partition: int, num_partitions: int
                    ) -> Iterator[tuple[Records, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield records of bands with the pairs among them: the places of either side in the records.

    Args:
        files: what `write_bands` wrote, by rank.
        order: of keeping documents.
        partition: number of the partition.
        num_partitions: number of all partitions.
    """
    slices = [found for file in files if (found := open_bucket(file, BAND, partition)).num_records]
    total = sum(found.num_records for found in slices)
    num_ranges = max(1, -(-total // RANGE_RECORDS))
    # The rule of `write_bands` turned round: the first key of this partition, and that of the next one.
    low, high = (-(-(edge << 32) // num_partitions) << 32 for edge in (partition, partition + 1))
    starts = [0] * len(slices)
    for number in range(1, num_ranges + 1):
        bound = low + (high - low) * number // num_ranges
        stops = [found.num_records if number == num_ranges else _first_from(found, bound, start)
                 for found, start in zip(slices, starts, strict=True)]
        parts = [found.part(start, stop) for found, start, stop in zip(slices, starts, stops, strict=True)]
        # A crowd may fill several blocks: the first documents of its band are found before any is paired.
        firsts = np.empty(0, BAND)
        if sum(part.num_records for part in parts) > RANGE_RECORDS:
            for block in _blocks(parts):
                records, _ = _in_bands(firsts, block, order)
                firsts = records[_places_in_band(records["key"]) < MAX_FIRST_DOCUMENTS]
        for block in _blocks(parts):
            records, is_of_block = _in_bands(firsts, block, order)
            yield (records, *_pairs(_places_in_band(records["key"]), is_of_block))
        starts = stops


def _first_from(found: Slice, bound: int, start: int) -> int:
    """Return the first place from `start` on whose key is not below a bound."""
    stop = found.num_records
    while start < stop:
        middle = (start + stop) // 2
        if int(found.read(middle, middle + 1)["key"][0]) < bound:
            start = middle + 1
        else:
            stop = middle
    return start


def _blocks(parts: Iterable[Slice]) -> Iterator[Records]:
    """Read slices, joined to blocks of about `RANGE_RECORDS`, and cut where one has more."""
    held: list[Records] = []
    count = 0
    for part in parts:
        for start in range(0, part.num_records, RANGE_RECORDS):
            held.append(part.read(start, min(start + RANGE_RECORDS, part.num_records)))
            count += len(held[-1])
            if count >= RANGE_RECORDS:
                yield np.concatenate(held)
                held, count = [], 0
    if count:
        yield np.concatenate(held)


def _in_bands(firsts: Records, block: Records, order: DocumentOrder) -> tuple[Records, NDArray[np.bool_]]:
    """Return the first documents of bands together with a block, each document of a band once, by band and
    the order of keeping; and which of the records are of the block."""
    # The block's records come first: of two of one document the stable sort leaves the block's in front.
    records = np.concatenate([block, firsts])
    sorting = np.lexsort((records["doc"], order.of(records["doc"], records["characters"]), records["key"]))
    records = records[sorting]
    is_repeated = np.zeros(len(records), np.bool_)
    is_repeated[1:] = (records["key"][1:] == records["key"][:-1]) & (
        records["doc"][1:] == records["doc"][:-1])
    return records[~is_repeated], (sorting < len(block))[~is_repeated]


def _places_in_band(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each of ascending keys how many like it stand before it."""
    here = np.arange(len(keys))
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])
    places: NDArray[np.int64] = here - np.maximum.accumulate(np.where(begins, here, 0))
    return places


def _pairs(places: NDArray[np.int64], is_of_block: NDArray[np.bool_]
           ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    here = np.arange(len(places))
    ones, others = [], []
    for first in range(min(MAX_FIRST_DOCUMENTS, int(places.max(initial=0)))):
        # A pair belongs to the block of its later document.
        later = here[(places > first) & is_of_block]
        ones.append(later)
        others.append(later - places[later] + first)
    nothing = np.empty(0, np.int64)
    return np.concatenate([nothing, *ones]), np.concatenate([nothing, *others])


# MinHash signatures (Broder, 1997) and the keys of their bands (locality-sensitive hashing).
#
# The shingles of a text are its runs of some words (`documents.overlap`).  Each of the signature's numbers is
# the smallest of the shingles' images under a permutation of 32 bits, ``x -> a x + b`` with an odd `a`; two
# texts agree in one of them with the probability of their Jaccard similarity.  With b bands of r numbers,
# texts of the similarity s have a band in common with the probability ``1 - (1 - s^r)^b``.

Signature = NDArray[np.uint32]

def compute_shingles(text: str, words: int) -> NDArray[np.uint64]:
    """Return the different shingles of a text, ascending: all runs of so many words, or the text itself
    where it is shorter; none where it has no words."""
    return np.unique(_shingles(find_units(text), words))


def _shingles(units: Units, words: int) -> NDArray[np.uint64]:
    found = units.runs(words)
    if len(found) or not len(units.hashes):
        return found
    return hash_stretches(units.hashes, np.array([0]), np.array([len(units.hashes)]))


class MinhashSigner:
    """Makes the signatures of texts."""

    def __init__(self, num_bands: int, rows_per_band: int, words: int, seed: int) -> None:
        """See `MinhashSettings`."""
        draw = np.random.Generator(np.random.PCG64(seed))
        count = num_bands * rows_per_band
        # An even factor would be no permutation modulo 2^32.
        self._factors = draw.integers(0, 1 << 32, count, np.uint32) | np.uint32(1)
        self._terms = draw.integers(0, 1 << 32, count, np.uint32)
        self._num_bands, self._words = num_bands, words

    def sign(self, text: str) -> Signature | None:
        """Return a text's signature [bands x rows] uint32; None: it has no words."""
        from data_prep.curate.dedup.minhash_loops import lower_signature

        found = _shingles(find_units(text), self._words)
        if not len(found):
            return None
        signature = np.full(len(self._factors), 0xFFFFFFFF, np.uint32)
        # The upper halves of the 64-bit hashes: permutations of 32 bits are faster, and estimates need no
        # more.
        lower_signature((found >> np.uint64(32)).astype(np.uint32), self._factors, self._terms, signature)
        return signature

    def band_keys(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return a key for each band of each signature, [n, bands] uint64, that only the same numbers of the
        same band share."""
        from data_prep.curate.dedup.minhash_loops import hash_bands

        keys = np.empty((len(signatures), self._num_bands), np.uint64)
        hash_bands(signatures, keys)
        return keys


PAIR_BLOCK = 1 << 18
REASON = "near duplicate"
MAX_SIGNATURE_NUMBERS = 1024


# Candidates compared shingle by shingle: the exact Jaccard similarity of pairs, in files per shard.


def write_pairs(file: Path, pairs: NDArray[np.uint64], num_ranks: int) -> None:
    """Write pairs of numbers [n, 2], each for the shards of both, once."""
    # Both shards need the shingles of their own side.
    both = sort_distinct_pairs(np.concatenate([pairs, pairs[:, ::-1]]))
    records = np.empty(len(both), PAIR)
    records["own"], records["other"] = both[:, 0], both[:, 1]
    write_buckets(file, records, get_ranks(records["own"]), num_ranks)


def read_pairs(folder: Path, rank: int) -> NDArray[np.uint64]:
    """Return the pairs of a shard's documents [n, 2], its own first, ascending; `folder`: with those of all
    partitions."""
    found = [open_bucket(file, PAIR, rank).read() for file in list_part_files(folder)]
    joined = np.concatenate([np.empty(0, PAIR), *found])
    return sort_distinct_pairs(np.stack([joined["own"], joined["other"]], axis=1))


def sort_distinct_pairs(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return different pairs [n, 2], ascending; `np.unique` sorts rows as bytes, which takes several times
    as long."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    is_new = np.ones(len(pairs), np.bool_)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[is_new]


class ShingleSets:
    """The shingles of those documents of a shard that are candidates.

    One file: each task of the comparison opens those of all other shards.  Behind the sets it has the rows,
    where each row's set begins, and how many rows there are.
    """

    def __init__(self, file: Path) -> None:
        check_seal(file, explain_deletion(file), get_place_in_run(file))
        with open(file, "rb") as f:  # a copy on write: compiled loops take arrays that may be written to
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        words = np.frombuffer(mapped, np.uint64, (len(mapped) - len(SEAL_PLACEHOLDER)) // np.uint64().nbytes)
        # From the end: the number n of rows; before it n + 1 begins; before those n rows.
        places = 2 * int(words[-1]) + 2
        self.shingles: NDArray[np.uint64] = words[:-places]
        self.rows, self.begins = np.split(words[-places:-1].view(np.int64), [int(words[-1])])

    def places(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.rows, wanted)

    @staticmethod
    def write(file: Path, documents: Iterator[list[Doc]], wanted: NDArray[np.int64], words: int) -> None:
        """Write the sets of rows of a shard."""
        keep = set(wanted.tolist())
        begins = [0]
        with create_file(file, create_parents=True) as temporary, open(temporary, "wb") as f:
            for batch in documents:
                for document in batch:
                    if document.row in keep:
                        found = compute_shingles(document.text, words)
                        found.tofile(f)
                        begins.append(begins[-1] + len(found))
            np.array([*np.sort(wanted).tolist(), *begins, len(wanted)], np.uint64).tofile(f)
            seal_file(temporary, get_place_in_run(file))


def iter_similar_pairs(pairs: NDArray[np.uint64], folder: Path, rank: int, threshold: float
                  ) -> Iterator[NDArray[np.uint64]]:
    """Yield those of a shard's pairs [n, 2] whose Jaccard similarity is at least the threshold.

    Args:
        pairs: the shard's own first.
        folder: of the sets of all shards, by rank.
        rank: of the shard.
        threshold: in (0, 1].
    """
    from data_prep.curate.dedup.minhash_loops import count_common

    # Each pair is in the lists of both its shards: the one that has the larger number compares it.
    pairs = pairs[pairs[:, 0] > pairs[:, 1]]
    own = ShingleSets(folder / f"{rank:06}")
    for other_rank in np.unique(get_ranks(pairs[:, 1])).tolist():
        other = ShingleSets(folder / f"{other_rank:06}")
        chosen = pairs[get_ranks(pairs[:, 1]) == other_rank]
        for start in range(0, len(chosen), PAIR_BLOCK):
            block = chosen[start:start + PAIR_BLOCK]
            places = np.stack([own.places(get_rows(block[:, 0])),
                               other.places(get_rows(block[:, 1]))], axis=1)
            common = np.empty(len(block), np.int64)
            count_common(own.shingles, own.begins, other.shingles, other.begins, places, common)
            sizes = (np.diff(own.begins)[places[:, 0]] + np.diff(other.begins)[places[:, 1]])
            # Jaccard's similarity, common / (|a| + |b| - common), without the division.
            yield block[common >= threshold * (sizes - common)]


@dataclass(frozen=True)
class MinhashSettings:
    """What counts as nearly the same."""

    threshold: Annotated[float, Gt(0), Le(1)] = 0.8
    """Least Jaccard similarity of two documents' shingles at which they are near duplicates."""
    num_bands: AtLeastOne = 20
    """Bands of a signature; documents with one in common are compared."""
    rows_per_band: AtLeastOne = 6
    """Numbers of a band: more of them make similarity count more steeply."""
    ngram: Annotated[int, Ge(1), Le(1000)] = 5
    """Words of a shingle; a character of Thai, Chinese or Japanese is a quarter of a word, a syllable of
    Korean a third."""
    seed: NotNegativeInt = 0
    """Of the permutations."""
    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""

    def problems(self) -> list[SettingsProblem]:
        numbers = self.num_bands * self.rows_per_band
        return [] if numbers <= MAX_SIGNATURE_NUMBERS else [SettingsProblem(
            ProblemCode.RULE, "num_bands",
            f"makes {numbers:,} numbers with rows_per_band = {self.rows_per_band}; "
            f"must be at most {MAX_SIGNATURE_NUMBERS}", self.num_bands)]


class MinhashDedup(Step):
    """Drops documents that are nearly the same as a kept one."""

    kind = "minhash_dedup"
    version = 3  # similarity is not passed on
    added_columns = {"duplicate_of": "string"}
    Settings = MinhashSettings
    settings: MinhashSettings

    def list_passes(self) -> Sequence[Pass]:
        """Return: signatures, documents with a band in common, their shingles, their comparison, and the
        selection."""
        return [Pass("signatures", self._sign), Pass("bands", self._pair, self.settings.partitions),
                Pass("shingles", self._write_shingles), Pass("verify", self._verify),
                Pass("clusters", self._cluster, 1)]

    def load_inputs(self, view: View) -> None:
        self._dropped = DuplicateFilter(Numbering(view), Register(view.work_folder / "documents"), REASON,
                                        lambda rank: open_bucket(view.work_folder / "dropped", DROPPED, rank
                                                                 ).read())

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return self._dropped.compute_outcomes(documents)

    def _sign(self, view: View, task: int) -> None:
        s, numbering, shard = self.settings, Numbering(view), view.shards[task]
        signer = MinhashSigner(s.num_bands, s.rows_per_band, s.ngram, s.seed)
        rank = numbering.rank_by_shard[shard]
        documents: list[tuple[int, int]] = []
        found: list[Signature] = []
        for batch in register_documents(view, shard, Register(view.work_folder / "documents"), rank):
            for document in batch:
                if (signature := signer.sign(document.text)) is not None:
                    documents.append((rank << 32 | document.row, len(document.text)))
                    found.append(signature)
        size = s.num_bands * s.rows_per_band
        signatures = np.array(found, np.uint32).reshape(-1, size)
        records = np.empty((len(found), s.num_bands), BAND)
        records["key"] = signer.band_keys(signatures)
        for place, name in enumerate(("doc", "characters")):
            records[name] = np.array(documents, np.uint64).reshape(-1, 2)[:, place:place + 1]
        write_bands(view.work_folder / "bands" / f"{rank:06}", records.reshape(-1), s.partitions)

    def _pair(self, view: View, task: int) -> None:
        files = [view.work_folder / "bands" / f"{rank:06}" for rank in range(len(view.shards))]
        with create_folder(view.work_folder / "pairs" / f"{task:05}") as temporary:
            for number, (records, ones, others) in enumerate(
                    iter_band_pairs(files, DocumentOrder(view), task, self.settings.partitions)):
                pairs = np.stack([records["doc"][ones], records["doc"][others]], axis=1)
                write_pairs(temporary / f"{number:06}", pairs, len(files))

    def _write_shingles(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        wanted = np.unique(read_pairs(view.work_folder / "pairs", rank)[:, 0] & np.uint64(0xFFFFFFFF))
        ShingleSets.write(view.work_folder / "shingles" / f"{rank:06}",
                          view.iter_documents(view.shards[task]),
                          wanted.astype(np.int64), self.settings.ngram)

    def _verify(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_by_shard[view.shards[task]]
        order, register = DocumentOrder(view), Register(view.work_folder / "documents")
        pairs = read_pairs(view.work_folder / "pairs", rank)
        edges = [np.empty(0, EDGE)]
        for block in iter_similar_pairs(pairs, view.work_folder / "shingles", rank, self.settings.threshold):
            # All pairs of a block are between the same two shards.
            lengths = [register.at(int(get_ranks(side[:1])[0]), get_rows(side))["characters"]
                       for side in block.T if len(side)]
            if lengths:
                edges.append(order.build_edges(block, np.stack(lengths, axis=1)))
        with create_folder(view.work_folder / "similar" / f"{rank:06}") as temporary:
            save_array(temporary / "edges.npy", sort_edges(np.concatenate(edges)))

    def _cluster(self, view: View, task: int) -> None:
        scratch = view.work_folder / ".clusters"
        shutil.rmtree(scratch, ignore_errors=True)
        clusters = Clusters(view, Register(view.work_folder / "documents"), scratch)
        clusters.select(list_part_files(view.work_folder / "similar"))
        clusters.write_dropped(view.work_folder / "dropped")
        # Last: should this task be killed here and run again, it reads `similar` alone.
        for used in (scratch, view.work_folder / "bands", view.work_folder / "shingles"):
            shutil.rmtree(used, ignore_errors=True)
