"""The gate's decision on planted cells."""

from __future__ import annotations

import math

import pytest

from megatron_sov.config import GateConfig, NeedleKind
from megatron_sov.eval.intervals import wilson_interval
from megatron_sov.eval.needle.suite import Cell
from megatron_sov.extend.verdict import decide

GATE = GateConfig(every_steps=1, min_accuracy=0.9, loss_tolerance_nats=0.05)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


def cells(*correct: int, samples: int = 20, length: int = 512, kind: NeedleKind = "single") -> list[Cell]:
    return [Cell(kind, "english", length, depth, 0, right, samples, wilson_interval(right, samples))
            for depth, right in zip(DEPTHS, correct, strict=False)]


@pytest.mark.parametrize(("correct", "rows", "single"), [
    ((20, 20, 20, 20, 20), 0, 0),
    # one miss of 20 is 5 %: single cells below 90 % are no evidence, their row reaches it
    ((18, 19, 17, 20, 18), 0, 0),
    ((18, 18, 18, 18, 17), 1, 0),  # 89 of 100
    ((20, 20, 20, 20, 13), 0, 1),  # 93 of 100, and one depth that is plainly worse
    ((3, 4, 2, 5, 3), 1, 5),
    ((0, 0, 0, 0, 0), 1, 5),
])
def test_a_row_reaches_the_threshold_and_no_cell_lies_below_it_for_sure(correct: tuple[int, ...], rows: int,
                                                                        single: int) -> None:
    verdict = decide(cells(*correct), 2.0, 2.0, GATE)
    assert (len(verdict.failing_rows), len(verdict.failing_cells)) == (rows, single)
    assert verdict.passed == (not rows and not single)
    assert len(verdict.lines()) == rows + single


def test_every_length_and_kind_is_a_row_of_its_own() -> None:
    good, bad = (cells(20, 20, 20, 20, 20),
                 cells(20, 20, 15, 15, 15, length=2048) + cells(17, 17, 17, 17, 17, kind="multi-key"))
    verdict = decide(good + bad, 2.0, 2.0, GATE)
    assert [(r["kind"], r["length_tokens"], r["correct"]) for r in verdict.failing_rows] == [
        ("single", 2048, 85), ("multi-key", 512, 85)]
    assert ("single, english, 2,048 tokens: 85 of 100 right over all depths = 85.0%, below 90%"
            in verdict.lines())


@pytest.mark.parametrize(("loss", "passes"), [(1.9, True), (2.04, True), (2.051, False), (math.nan, False)])
def test_the_short_context_stays_within_the_tolerance(loss: float, passes: bool) -> None:
    verdict = decide(cells(20, 20, 20, 20, 20), loss, 2.0, GATE)
    assert verdict.passed == passes
    assert bool(verdict.lines()) == (not passes)


def test_a_model_that_is_right_97_percent_of_the_time_passes_where_every_cell_alone_would_fail_it() -> None:
    """A gate that asks 95 % of each of 5 cells of 20 stops such a model in nearly half of all tests."""
    import numpy as np

    generator = np.random.default_rng(0)
    strict = GateConfig(every_steps=1, min_accuracy=0.95)
    draws = generator.binomial(20, 0.97, (400, 5))
    alone = np.mean((draws < 19).any(axis=1))
    judged = np.mean([not decide(cells(*row), 2.0, 2.0, strict).passed for row in draws.tolist()])
    assert alone > 0.4 and judged < 0.15
    poor = generator.binomial(20, 0.8, (400, 5))
    assert np.mean([decide(cells(*row), 2.0, 2.0, strict).passed for row in poor.tolist()]) == 0
