"""Step `level`: rank documents by score within each language, and cut the ranks into basic, L1, L2 and L3.

Solar Open keeps the top 50 % by educational score for L2 and the top 35 % for L3, with percentiles for each
language. We know of no published share for L1: by default every document with a score has at least L1.

Cuts are exact. A first pass writes the sorted keys of each shard's documents, 8 bytes each. A second pass
finds the key of each cut byte by byte, by binary search in these files, with one file open at a time.
Documents with equal scores are ordered by a hash, so that a cut always splits them alike and each level has
its exact share.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le

from data_prep.curate.pipeline.step import Doc, Pass, Step, StepOutcome, View
from data_prep.damaged_files import explain_deletion, read_array, write_array
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_sealed_json, write_sealed_json
from megatron_sov.base.settings import AtLeastOne, NotBlank, at_most_field

LEVELS = ("L1", "L2", "L3")
BASIC = "basic"
SMALL = "small languages together"
"""Pool for groups below `LevelSettings.min_documents`."""
CUTS_FILE = "levels.json"
ShareAboveZero = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class LevelSettings:
    """Settings for `level`."""

    by: NotBlank = "education"
    """Column with scores; higher scores are better."""
    l1: ShareAboveZero = 1.0
    """Share of scored documents with level L1 or better."""
    l2: Annotated[ShareAboveZero, at_most_field("l1")] = 0.5
    """Share with level L2 or better."""
    l3: Annotated[ShareAboveZero, at_most_field("l2")] = 0.35
    """Share with level L3."""
    per: str = "language"
    """Column that divides documents into groups with separate cuts; "": one group."""
    min_documents: AtLeastOne = 100
    """Groups with fewer documents share their cuts, because percentiles of few documents are noise."""


class Level(Step):
    """Adds the column `level`."""

    kind = "level"
    version = 2  # keys without the place in the run
    added_columns = {"level": "string"}
    Settings = LevelSettings
    settings: LevelSettings

    def __init__(self, settings: LevelSettings) -> None:
        super().__init__(settings)
        self.needed_columns = tuple(filter(None, (settings.by, settings.per)))  # type: ignore[misc]

    def list_passes(self) -> Sequence[Pass]:
        return (Pass("keys", self._write_keys), Pass("cuts", self._write_cuts, 1))

    def load_inputs(self, view: View) -> None:
        file = view.work_folder / CUTS_FILE
        groups = read_sealed_json(file, explain_deletion(file))["groups"]
        self._cuts: dict[str, list[int]] = {name: group["cuts"] for name, group in groups.items()}

    def judge_document(self, document: Doc) -> StepOutcome:
        return StepOutcome(values={"level": self._choose_level(document)})

    def _choose_level(self, document: Doc) -> str:
        key = self._compute_key(document)
        if key is None:
            return BASIC
        cuts = self._cuts[self._get_group(document)]
        # Cuts fall from L3 to L1.
        return next((level for level, cut in zip(LEVELS[::-1], cuts[::-1], strict=True) if key >= cut), BASIC)

    def _get_group(self, document: Doc) -> str:
        return str(document.columns.get(self.settings.per) or "") if self.settings.per else ""

    def _compute_key(self, document: Doc) -> int | None:
        """Return 64 bits that sort by score, then by hash; None without a score. Raises `UserError`: the
        column `by` holds no number."""
        score = document.columns.get(self.settings.by)
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, Real):
            raise UserError(f"level: by = {self.settings.by}: document {document.id} has {str(score)[:40]!r} "
                            "there, which is no number; name a column of scores")
        if math.isnan(score):
            return None
        hashed = int.from_bytes(blake2b(document.sampling_key.encode(), digest_size=4).digest(), "little")
        return _to_sortable(float(score)) << 32 | hashed

    def _write_keys(self, view: View, task: int) -> None:
        """Write an array with the keys of a shard's documents, sorted within each group."""
        groups: dict[str, list[int]] = {}
        num_without = 0
        for document in view.iter_documents(view.shards[task]):
            key = self._compute_key(document)
            if key is None:
                num_without += 1
            else:
                groups.setdefault(self._get_group(document), []).append(key)
        ranges: dict[str, list[int]] = {}
        arrays = [np.zeros(0, np.uint64)]
        start = 0
        for name, keys in sorted(groups.items()):
            ranges[name] = [start, start + len(keys)]
            arrays.append(np.sort(np.array(keys, np.uint64)))
            start += len(keys)
        folder = view.work_folder / "keys"
        # The index comes last: a task killed before leaves no index to missing keys.
        write_array(folder / f"{task:06d}.npy", np.concatenate(arrays))
        write_sealed_json(folder / f"{task:06d}.json", {"groups": ranges, "num_without": num_without})

    def _write_cuts(self, view: View, task: int) -> None:
        """Write the lowest key of each level for each group."""
        shards = [(file.with_suffix(".npy"), read_sealed_json(file, explain_deletion(file)))
                  for file in sorted((view.work_folder / "keys").glob("*.json"))]
        counts: Counter[str] = Counter()
        for _, shard in shards:
            for name, (start, stop) in shard["groups"].items():
                counts[name] += stop - start
        pools = {name: SMALL if count < self.settings.min_documents else name
                 for name, count in counts.items()}
        pool_counts: Counter[str] = Counter()
        for name, count in counts.items():
            pool_counts[pools[name]] += count
        # Exact decimals: the binary value for 0.35 would move a cut by a document.
        shares = [Fraction(str(getattr(self.settings, level.lower()))) for level in LEVELS]
        ranks = {pool: [math.ceil(count * share) for share in shares] for pool, count in pool_counts.items()}
        cuts = find_cuts(shards, pools, ranks)
        groups = {name: {"judged_as": pools[name], "num_documents": counts[name], "cuts": cuts[pools[name]]}
                  for name in sorted(counts)}
        num_without = sum(shard["num_without"] for _, shard in shards)
        write_sealed_json(view.work_folder / CUTS_FILE, {"groups": groups, "num_without_score": num_without})


def _to_sortable(score: float) -> int:
    """Convert a float32 to 32 bits in the same order."""
    bits = int((np.float32(score) + np.float32(0.0)).view(np.uint32))  # -0.0 becomes 0.0
    # IEEE 754: set the sign bit of positive numbers, flip all bits of negative numbers.
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 1 << 31


def find_cuts(shards: Sequence[tuple[Path, dict[str, Any]]], pools: Mapping[str, str],
              ranks: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Find the r-th largest key of a pool for each rank r: the largest number that r keys reach.

    Args:
        shards: file with keys, and its index.
        pools: group -> pool.
        ranks: pool -> ranks.

    Returns:
        Pool -> keys.
    """
    cuts = {pool: np.zeros(len(pool_ranks), np.uint64) for pool, pool_ranks in ranks.items()}
    # Eight rounds from the highest byte to the lowest; each opens every file once.
    for shift in range(56, -1, -8):
        bytes_ = np.arange(256, dtype=np.uint64) << np.uint64(shift)
        candidates = {pool: pool_cuts[:, None] | bytes_ for pool, pool_cuts in cuts.items()}
        num_reaching = {pool: np.zeros(keys.shape, np.int64) for pool, keys in candidates.items()}
        for file, shard in shards:
            keys = read_array(file)
            for name, (start, stop) in shard["groups"].items():
                below = np.searchsorted(keys[start:stop], candidates[pools[name]], "left")
                num_reaching[pools[name]] += stop - start - below
        for pool, pool_ranks in ranks.items():
            # Counts fall as candidates rise: the last candidate with enough keys has the right byte.
            best = (num_reaching[pool] >= np.array(pool_ranks)[:, None]).sum(axis=1) - 1
            cuts[pool] = candidates[pool][np.arange(len(pool_ranks)), best]
    return {pool: pool_cuts.tolist() for pool, pool_cuts in cuts.items()}
