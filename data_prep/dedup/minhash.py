"""Step `minhash_dedup`: of documents that nearly agree one stays.

signatures (per shard) -> bands in common (per partition) -> shingles and their comparison (per shard, where
candidates are verified exactly) -> clusters (one task).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from data_prep.dedup.candidates import band_dtype, blocks_of_bands, write_bands
from data_prep.dedup.clusters import DROPPED, Clusters
from data_prep.dedup.dropping import Dropped
from data_prep.dedup.exact import Partitions
from data_prep.dedup.numbering import Numbering, Register, registered
from data_prep.dedup.report import write_report
from data_prep.dedup.signatures import Signature, Signer, estimated, sketches
from data_prep.dedup.verified import ShingleSets, distinct, read_pairs, similar_pairs, write_pairs
from data_prep.dedup.work_files import Records, bucket_slice, new_folder, parts_of, read_array, save_array
from data_prep.pipeline.step import Doc, Outcome, Pass, Step, View
from megatron_sov.settings import AtLeastOne, Code, NotNegativeInt, Problem

REASON = "near duplicate"
MOST_NUMBERS = 1024


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
    verify: Literal["exact", "estimated"] = "exact"
    """"exact": candidates are compared by all their shingles; "estimated": by eight bits of each number of
    their signatures, without reading any text again."""
    keep: Literal["longest", "first"] = "longest"
    """Who stays of a cluster, among those of the highest priority: the "longest", or the "first"."""
    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        numbers = self.num_bands * self.rows_per_band
        return [] if numbers <= MOST_NUMBERS else [Problem(
            Code.RULE, "num_bands", f"makes {numbers:,} numbers with rows_per_band = {self.rows_per_band}; "
            f"must be at most {MOST_NUMBERS}", self.num_bands)]


class MinhashDedup(Step):
    """Drops documents that are nearly the same as another one."""

    kind = "minhash_dedup"
    version = 2
    adds = {"duplicate_of": "string"}
    Settings = MinhashSettings
    settings: MinhashSettings

    def passes(self) -> Sequence[Pass]:
        """Return them in order; without the two that read text again where similarity is estimated."""
        exactly = [Pass("shingles", self._write_shingles), Pass("verify", self._verify)]
        return [Pass("signatures", self._sign), Pass("bands", self._pair, self.settings.partitions),
                *(exactly if self.settings.verify == "exact" else []),
                Pass("clusters", self._cluster, 1)]

    def start(self, view: View) -> None:
        """Open what the passes left."""
        self._dropped = Dropped(Numbering(view), Register(view.work / "documents"), REASON,
                                _lists(view.work))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Drop what is listed."""
        return self._dropped.outcomes(documents)

    @property
    def _dtype(self) -> np.dtype[np.void]:
        size = self.settings.num_bands * self.settings.rows_per_band
        return band_dtype(size if self.settings.verify == "estimated" else 0)

    def _sign(self, view: View, task: int) -> None:
        s, numbering, shard = self.settings, Numbering(view), view.shards[task]
        signer = Signer(s.num_bands, s.rows_per_band, s.ngram, s.seed)
        rank = numbering.rank_of[shard]
        numbers: list[int] = []
        found: list[Signature] = []
        for batch in registered(view, shard, Register(view.work / "documents"), rank):
            for document in batch:
                if (signature := signer.sign(document.text)) is not None:
                    numbers.append(rank << 32 | document.row)
                    found.append(signature)
        size = s.num_bands * s.rows_per_band
        signatures = np.array(found, np.uint32).reshape(-1, size)
        records = np.empty((len(found), s.num_bands), self._dtype)
        records["key"] = signer.band_keys(signatures)
        records["doc"] = np.array(numbers, np.uint64)[:, None]
        if s.verify == "estimated":
            records["sketch"] = sketches(signatures)[:, None, :]
        write_bands(view.work / "bands" / f"{rank:06}", records.reshape(-1), s.partitions)

    def _pair(self, view: View, task: int) -> None:
        s = self.settings
        files = [view.work / "bands" / f"{rank:06}" for rank in range(len(view.shards))]
        with new_folder(view.work / "pairs" / f"{task:05}") as temporary:
            for number, (records, ones, others) in enumerate(
                    blocks_of_bands(files, self._dtype, task, s.partitions)):
                if s.verify == "estimated":
                    agree = estimated(records["sketch"], ones, others) >= s.threshold
                    ones, others = ones[agree], others[agree]
                pairs = np.stack([records["doc"][ones], records["doc"][others]], axis=1)
                if s.verify == "exact":
                    write_pairs(temporary / f"{number:06}", pairs, len(files))
                else:
                    save_array(temporary / f"{number:06}.npy", distinct(pairs))

    def _write_shingles(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_of[view.shards[task]]
        wanted = np.unique(read_pairs(view.work / "pairs", rank)[:, 0] & np.uint64(0xFFFFFFFF))
        ShingleSets.write(view.work / "shingles" / f"{rank:06}", view.documents(view.shards[task]),
                          wanted.astype(np.int64), self.settings.ngram)

    def _verify(self, view: View, task: int) -> None:
        rank = Numbering(view).rank_of[view.shards[task]]
        pairs = read_pairs(view.work / "pairs", rank)
        with new_folder(view.work / "similar" / f"{rank:06}") as temporary:
            found = similar_pairs(pairs, view.work / "shingles", rank, self.settings.threshold)
            edges = np.concatenate([np.empty((0, 2), np.uint64), *found])
            save_array(temporary / "edges.npy", edges)

    def _cluster(self, view: View, task: int) -> None:
        folder = view.work / "similar" if self.settings.verify == "exact" else view.work / "pairs"
        scratch = view.work / ".clusters"
        clusters = Clusters(view, Register(view.work / "documents"), scratch)
        for file in parts_of(folder):
            clusters.unite(read_array(file))
        clusters.write_dropped(view.work / "dropped", self.settings.keep)
        sizes = clusters.sizes()
        write_report(view, _lists(view.work), "Near duplicates",
                     [{"title": "Clusters by size", "labels": [name for name, _ in sizes],
                       "counts": [count for _, count in sizes], "note": "documents of a cluster"}])
        # what is large and has served
        for used in (scratch, view.work / "bands", view.work / "shingles"):
            shutil.rmtree(used, ignore_errors=True)


def _lists(work: Path) -> Callable[[int], Records]:
    """Return rank -> what goes from a shard."""
    return lambda rank: bucket_slice(work / "dropped", DROPPED, rank).read()
