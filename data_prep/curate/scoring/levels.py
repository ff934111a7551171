"""Step `level`: basic, L1, L2 or L3, by where a document's score stands among those of its language.

Solar Open keeps the top 50 % by educational score for L2 and the top 35 % for L3, with percentiles for each
language.  No share for L1 is published that we know of: here it is every document that has a score, until
`l1` says less; `basic` is what has none, or stands below it.

The cuts are exact.  A first pass writes for each shard the sorted keys of its documents, 8 bytes each; a
second one finds the key of each cut byte by byte, by binary search in those files, and never holds more than
one of them open.  Documents of one score are ordered by the hashes of their places, so a cut splits them
in the same way every time, and a level has as many documents as its share says.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Gt, Le

from data_prep.curate.pipeline.step import ColumnType, Doc, Pass, Step, StepOutcome, View
from data_prep.damaged_files import explain_deletion, get_place_in_run
from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import check_seal, read_sealed_json, seal_bytes, write_sealed_json
from megatron_sov.base.settings import AtLeastOne, NotBlank, at_most_field

LEVELS = ("L1", "L2", "L3")
BASIC = "basic"
SMALL = "small languages together"
_FILE = "levels.json"
ShareAboveZero = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class LevelSettings:
    """Settings of `level`."""

    by: NotBlank = "education"
    """Column of scores; a higher one is better."""
    l1: ShareAboveZero = 1.0
    """Share of the documents with a score that are L1 or better."""
    l2: Annotated[ShareAboveZero, at_most_field("l1")] = 0.5
    """Share that is L2 or better."""
    l3: Annotated[ShareAboveZero, at_most_field("l2")] = 0.35
    """Share that is L3."""
    per: str = "language"
    """Column whose values are each judged apart; "": all documents together."""
    min_documents: AtLeastOne = 100
    """A value of `per` with fewer documents is judged together with the others of that sort: a percentile
    of a handful says nothing."""


class Level(Step):
    """A column of levels."""

    kind: ClassVar[str] = "level"
    added_columns: ClassVar[Mapping[str, ColumnType]] = {"level": "string"}
    Settings = LevelSettings

    def __init__(self, settings: LevelSettings) -> None:
        super().__init__(settings)
        self.needed_columns = tuple(filter(None, (settings.by, settings.per)))  # type: ignore[misc]
        self._cuts: dict[str, list[int]] = {}

    def list_passes(self) -> Sequence[Pass]:
        return (Pass("keys", self.write_keys), Pass("cuts", self.write_cuts, 1))

    def write_keys(self, view: View, task: int) -> None:
        """Write the sorted keys of a shard's documents, group after group."""
        groups: dict[str, list[int]] = {}
        num_without = 0
        for documents in view.iter_documents(view.shards[task]):
            for document in documents:
                key = self._key(document)
                if key is None:
                    num_without += 1
                else:
                    groups.setdefault(self._group(document), []).append(key)
        # One array a shard: keys of a group next to each other and sorted, and where each group begins and
        # ends.
        places, start = {}, 0
        for name in sorted(groups):
            places[name] = [start, start + len(groups[name])]
            start += len(groups[name])
        found = np.concatenate([np.zeros(0, np.uint64), *(np.sort(np.array(groups[name], np.uint64))
                                                          for name in sorted(groups))])
        raw = io.BytesIO()
        np.save(raw, found)
        folder = view.work_folder / "keys"
        folder.mkdir(parents=True, exist_ok=True)
        keys, beside = folder / f"{task:06d}.npy", folder / f"{task:06d}.json"
        # The keys before the .json that names them: a pass that is killed in between leaves no list of keys
        # that are not there.
        write_atomically(keys, seal_bytes(raw.getvalue(), get_place_in_run(keys)))
        write_sealed_json(beside, {"groups": places, "num_without": num_without}, get_place_in_run(beside))

    def write_cuts(self, view: View, task: int) -> None:
        """Write the lowest key of each level for each group."""
        shards = [(file.with_suffix(".npy"), read_sealed_json(file, explain_deletion(file),
                                                               get_place_in_run(file)))
                  for file in sorted((view.work_folder / "keys").glob("*.json"))]
        counts: dict[str, int] = {}
        for _, shard in shards:
            for name, (start, stop) in shard["groups"].items():
                counts[name] = counts.get(name, 0) + stop - start
        pool = {name: SMALL if count < self.settings.min_documents else name
                for name, count in counts.items()}
        totals: dict[str, int] = {}
        for name, count in counts.items():
            totals[pool[name]] = totals.get(pool[name], 0) + count
        # As a fraction of the decimal that was written: 0.35 in binary would move a cut by a document.
        shares = [Fraction(str(getattr(self.settings, level.lower()))) for level in LEVELS]
        ranks = {name: [math.ceil(n * share) for share in shares] for name, n in totals.items()}
        cuts = _cuts(shards, pool, ranks)
        record = {"groups": {name: {"judged_as": pool[name], "num_documents": counts[name],
                                    "cuts": cuts[pool[name]]} for name in sorted(counts)},
                  "num_without_score": sum(shard["num_without"] for _, shard in shards)}
        write_sealed_json(view.work_folder / _FILE, record, get_place_in_run(view.work_folder / _FILE))

    def load_inputs(self, view: View) -> None:
        file = view.work_folder / _FILE
        groups = read_sealed_json(file, explain_deletion(file), get_place_in_run(file))["groups"]
        self._cuts = {name: group["cuts"] for name, group in groups.items()}

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        found = []
        for document in documents:
            key, level = self._key(document), BASIC
            if key is not None:
                cuts = self._cuts[self._group(document)]
                level = next((name for name, cut in zip(LEVELS[::-1], cuts[::-1], strict=True)
                              if key >= cut), BASIC)
            found.append(StepOutcome(values={"level": level}))
        return found

    def _group(self, document: Doc) -> str:
        return str(document.columns.get(self.settings.per) or "") if self.settings.per else ""

    def _key(self, document: Doc) -> int | None:
        """Return what documents are ordered by: the score, then the hash of the place; None without a score.

        Raises:
            UserError: the column holds something else.
        """
        score = document.columns.get(self.settings.by)
        if score is not None and (isinstance(score, bool) or not isinstance(score, Real)):
            raise UserError(f"level: by = {self.settings.by}: document {document.id} has {str(score)[:40]!r} "
                            "there, which is no number; name a column of scores")
        if score is None or math.isnan(score):
            return None
        # Ties are broken by a hash of the place: any share of them can be taken, and always the same.
        hashed = int.from_bytes(blake2b(document.sampling_key.encode(), digest_size=4).digest(), "little")
        return _to_sortable(float(score)) << 32 | hashed


def _to_sortable(score: float) -> int:
    """Return a float32 as a number of 32 bits that is larger where the float is."""
    bits = int((np.float32(score) + np.float32(0.0)).view(np.uint32))  # -0.0 is 0.0
    # IEEE floats sort as integers when the sign bit of positive ones is set and negative ones are flipped.
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 1 << 31


def _cuts(shards: Sequence[tuple[Path, dict[str, Any]]], pool: Mapping[str, str],
          ranks: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return, for each pool and rank r, the r-th largest of its keys: the largest number that at least r keys
    reach, found from its highest byte to its lowest."""
    cuts = {name: np.zeros(len(wanted), np.uint64) for name, wanted in ranks.items()}
    # Eight rounds, a byte each: 256 candidates share all bytes above. In every round each file is opened
    # once.
    for shift in range(56, -1, -8):
        bytes_ = np.arange(256, dtype=np.uint64) << np.uint64(shift)
        tried = {name: found[:, None] | bytes_ for name, found in cuts.items()}
        reached = {name: np.zeros(found.shape, np.int64) for name, found in tried.items()}
        for file, shard in shards:
            check_seal(file, explain_deletion(file), get_place_in_run(file))
            keys = np.load(file, mmap_mode="r" if shard["groups"] else None)
            for name, (start, stop) in shard["groups"].items():
                below = np.searchsorted(keys[start:stop], tried[pool[name]], "left")
                reached[pool[name]] += stop - start - below
        for name, wanted in ranks.items():
            # Counts fall as candidates rise: the last that enough keys reach has the right byte.
            best = (reached[name] >= np.array(wanted)[:, None]).sum(axis=1) - 1
            cuts[name] = tried[name][np.arange(len(wanted)), best]
    return {name: found.tolist() for name, found in cuts.items()}
