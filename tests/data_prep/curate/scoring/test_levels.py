"""Levels: exact shares, deterministic ties, small languages reported, floats ordered."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from data_prep.curate.pipeline.step import Doc, ShardRef
from data_prep.curate.scoring.levels import SMALL, Level, LevelSettings, _to_sortable
from megatron_sov.base.errors import UserError
from tests.data_prep.curate.pipeline.memory_view import MemoryView, doc, run_step
from tests.typed_words import keys_of


def build_shards(scores: list[Any], languages: list[str | None], per_shard: int = 70) -> list[list[Doc]]:
    """Return documents with a score and a language only."""
    return [[doc("", row, shard=start // per_shard, education=scores[i], language=languages[i])
             for row, i in enumerate(range(start, min(start + per_shard, len(scores))))]
            for start in range(0, len(scores), per_shard)]


def assign_levels(documents: list[list[Doc]], work: Path, **settings: Any) -> dict[str, str]:
    """Return document id -> level."""
    outcomes = run_step(Level, LevelSettings(**settings), MemoryView.of(documents, work))
    return {id_: outcome.values["level"] for id_, outcome in outcomes.items()}


def test_levels_are_shares_of_each_language_by_score(tmp_path: Path) -> None:
    rng = random.Random(0)
    languages = [rng.choice(["en", "en", "ko"]) for _ in range(400)]
    scores = [float(np.float32(rng.gauss(2.0 if x == "en" else 1.0, 0.7))) for x in languages]
    documents = build_shards(scores, languages)
    level_by_id = assign_levels(documents, tmp_path, l1=0.8)
    for language in ("en", "ko"):
        ranked = sorted(((d.columns["education"], level_by_id[d.id]) for shard in documents for d in shard
                         if d.columns["language"] == language), reverse=True)
        ends = [math.ceil(len(ranked) * share) for share in (0.35, 0.5, 0.8, 1)]
        expected: list[str] = []
        for level, end in zip(("L3", "L2", "L1", "basic"), ends, strict=True):
            expected += [level] * (end - len(expected))
        assert [level for _, level in ranked] == expected


def test_ties_are_split_independent_of_document_order(tmp_path: Path) -> None:
    documents = build_shards([3.0] * 200, ["en"] * 200)
    level_by_id = assign_levels(documents, tmp_path / "a")
    assert Counter(level_by_id.values()) == {"L3": 70, "L2": 30, "L1": 100}
    # the same documents in another order and in two other shards
    shuffled = [d for shard in documents for d in shard]
    random.Random(1).shuffle(shuffled)
    view = MemoryView({ShardRef("web", 0): [d for d in shuffled if d.row % 2],
                       ShardRef("web", 1): [d for d in shuffled if not d.row % 2]}, tmp_path / "b")
    outcomes = run_step(Level, LevelSettings(), view)
    assert {id_: outcome.values["level"] for id_, outcome in outcomes.items()} == level_by_id


def test_documents_without_a_score_are_basic_and_do_not_count(tmp_path: Path) -> None:
    scores = [None, math.nan, *([1.0] * 50), *([2.0] * 50)]
    documents = build_shards(scores, ["en"] * 102)
    level_by_id = assign_levels(documents, tmp_path)
    assert [level_by_id[d.id] for d in documents[0][:2]] == ["basic", "basic"]
    # of 100 scores, 35 % are L3, and half are L3 or L2
    assert Counter(level_by_id.values()) == {"basic": 2, "L3": 35, "L2": 15, "L1": 50}
    assert {level_by_id[d.id] for s in documents for d in s if d.columns["education"] == 2.0} == {"L3", "L2"}


def test_small_languages_share_their_cuts_and_are_listed(tmp_path: Path) -> None:
    languages = ["en"] * 100 + ["vi"] * 12 + ["th"] * 7 + [None]
    level_by_id = assign_levels(build_shards([i / 7 for i in range(120)], languages), tmp_path)
    record = json.loads((tmp_path / "levels.json").read_text())["groups"]
    assert {name: group["judged_as"] for name, group in record.items()} == {
        "": SMALL, "en": "en", "th": SMALL, "vi": SMALL}
    assert record["th"]["cuts"] == record["vi"]["cuts"] == record[""]["cuts"] != record["en"]["cuts"]
    # 12 + 7 + 1 documents are ranked together
    assert Counter(list(level_by_id.values())[100:]) == {"L3": 7, "L2": 3, "L1": 10}


def test_all_documents_together_and_another_column(tmp_path: Path) -> None:
    documents = [[doc("", i, quality=i / 100) for i in range(100)]]
    level_by_id = assign_levels(documents, tmp_path, by="quality", per="", l3=0.1)
    assert list(level_by_id.values()) == ["L1"] * 50 + ["L2"] * 40 + ["L3"] * 10
    assert Level(LevelSettings(by="quality", per="")).needed_columns == ("quality",)
    assert Level(LevelSettings()).needed_columns == ("education", "language")


def test_a_column_without_numbers_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"level: by = name: document web:0:0{16} has 'web' there"):
        assign_levels([[doc("", 0, language="en", name="web")]], tmp_path, by="name")


FLOATS = st.floats(width=32, allow_nan=False)


@given(FLOATS, FLOATS)
def test_floats_keep_their_order(a: float, b: float) -> None:
    assert (_to_sortable(a) < _to_sortable(b)) == (a < b)


@pytest.mark.parametrize("settings", [
    {"l3": 0.6}, {"l2": 1.0, "l1": 0.5}, {"l1": 1.5}, {"l3": 0}, {"by": ""}, {"min_documents": 0}])
def test_invalid_settings_are_reported(settings: dict[str, Any]) -> None:
    assert keys_of(LevelSettings(**settings)) == [next(iter(settings))]
    assert keys_of(LevelSettings()) == []
