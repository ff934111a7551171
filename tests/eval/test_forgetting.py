"""What counts as forgotten: the whole interval beyond the tolerance, and nothing less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.eval.score_differences import FORGOTTEN, KEPT, NOT_PROVEN, Forgetting, judge, read_scored
from megatron_sov.eval.statistics import paired_difference

Written = Callable[..., Path]


def verdict(written_scores: Written, tmp_path: Path, before: list[float], after: list[float],
            tolerance: float, metric: str = "acc") -> Forgetting:
    paths = [written_scores(tmp_path / f"{name}.json", scores, metric=metric)
             for name, scores in (("start", before), ("last", after))]
    return judge(*(read_scored(path) for path in paths), tolerance)


@pytest.mark.parametrize(("lost", "items", "tolerance", "word"), [
    (0, 400, 0.03, KEPT), (4, 400, 0.03, KEPT), (40, 400, 0.03, FORGOTTEN),
    (0, 20, 0.03, NOT_PROVEN), (2, 20, 0.03, NOT_PROVEN), (12, 20, 0.03, FORGOTTEN),
    (40, 400, 0.2, KEPT), (12, 400, 0.03, NOT_PROVEN),
])
def test_few_items_prove_little_and_many_prove_much(
        written_scores: Written, tmp_path: Path, lost: int, items: int, tolerance: float, word: str) -> None:
    found = verdict(written_scores, tmp_path, [1.0] * items, [0.0] * lost + [1.0] * (items - lost), tolerance)
    assert [task.word for task in found.tasks] == [word]
    assert found.passed == (word != FORGOTTEN)
    assert word in found.lines()[0] and f"tolerance {tolerance:g}" in found.lines()[0]


def test_a_loss_is_forgotten_upwards(written_scores: Written, tmp_path: Path) -> None:
    before = np.random.default_rng(0).normal(3, 1, 50)
    for change, word in ((0.5, FORGOTTEN), (-0.5, KEPT)):
        after = (before + change).tolist()
        assert verdict(written_scores, tmp_path, before.tolist(), after, 0.1, "loss").tasks[0].word == word


def test_a_model_that_lost_just_what_it_may_fails_about_one_time_in_twenty() -> None:
    """The rule is a test of 5 %: drawn at the edge, where it errs most."""
    draw, failed = np.random.default_rng(1), 0
    for _ in range(800):
        change = draw.choice([-1.0, 0.0, 1.0], 300, p=[0.10, 0.85, 0.05])
        before = np.where(change == 0, draw.integers(0, 2, 300), change < 0).astype(float)
        after = (before + change).tolist()
        failed += paired_difference(before.tolist(), after, confidence=0.9).interval[1] < -0.05
    assert 0.03 < failed / 800 < 0.07


def test_a_figure_that_is_missing_does_not_pass(written_scores: Written, tmp_path: Path) -> None:
    paths = written_scores(tmp_path / "a.json", [1.0, 0.0]), written_scores(tmp_path / "b.json", [None, None])
    found = judge(*map(read_scored, paths), 0.03)
    assert not found.passed and "not known" in found.lines()[0]


def test_a_group_is_judged_by_its_tasks(written_scores: Written, tmp_path: Path) -> None:
    """Its figure is a mean of theirs, without items of its own."""
    scored = read_scored(written_scores(tmp_path / "a.json", [1.0] * 40))
    quiz = scored.results.tasks["quiz"]
    group = dataclasses.replace(scored.results, tasks={"all": quiz, "quiz": quiz})
    both = dataclasses.replace(scored, results=group, items={"all": {}, **scored.items})
    assert [task.difference.task for task in judge(both, both, 0.1).tasks] == ["quiz"]
    nothing = dataclasses.replace(quiz, items=0, metrics=(dataclasses.replace(quiz.metrics[0], value=None),))
    empty = dataclasses.replace(scored, results=dataclasses.replace(group, tasks={"quiz": nothing}),
                                items={"quiz": {}})
    assert not judge(empty, empty, 0.1).passed
