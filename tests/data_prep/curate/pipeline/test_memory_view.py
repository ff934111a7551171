"""The view in memory sees steps that depend on how documents are cut, or on what ran before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.curate.pipeline.step import Doc, Pass, Step, StepOutcome, View
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, kept, outcomes


@dataclass(frozen=True)
class Settings:
    longest: int = 3


class Longest(Step):
    """Keeps texts that are as short as a setting, and says how many characters all shards have."""

    kind = "longest"
    adds = {"num_all": "int64"}
    Settings = Settings

    def passes(self) -> Sequence[Pass]:
        return [Pass("count", self.count)]

    def count(self, view: View, task: int) -> None:
        shard = view.shards[task]
        number = sum(len(d.text) for batch in view.documents(shard) for d in batch)
        (view.work / f"{shard.source}-{shard.number}").write_text(str(number))

    def start(self, view: View) -> None:
        self.num_all = sum(int(file.read_text()) for file in view.work.iterdir())

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [StepOutcome(values={"num_all": self.num_all}) if len(d.text) <= self.settings.longest
                else StepOutcome("too long") for d in documents]


class OneOfABatch(Longest):
    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [StepOutcome("not the first" if i else "") for i, _ in enumerate(documents)]


class Appends(Longest):
    def count(self, view: View, task: int) -> None:
        with open(view.work / "all", "a") as f:
            f.write("x")


def test_passes_come_before_outcomes(tmp_path: Path) -> None:
    shards = [docs("ab", "abcd", "abc"), docs("a", source="books")]
    found = outcomes(Longest, Settings(), MemoryView.of(shards, tmp_path))
    assert [o.reason for o in found.values()] == ["", "too long", "", ""]
    left = kept(shards[0], found)
    assert [(d.text, d.columns) for d in left] == [("ab", {"num_all": 10}), ("abc", {"num_all": 10})]


def test_a_step_that_looks_at_its_batch_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="another outcome alone than in a batch"):
        outcomes(OneOfABatch, Settings(), MemoryView.of([docs("a", "b", "c")], tmp_path))


def test_a_pass_that_counts_twice_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="another result when it is run again"):
        outcomes(Appends, Settings(), MemoryView.of([docs("a", "b", "c")], tmp_path))
