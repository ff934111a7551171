"""Which of a run's checkpoints are averaged, and how much each counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.convert import average_weights
from megatron_sov.convert.average_weights import chosen, weights_of
from megatron_sov.errors import UserError


def test_a_moving_average_over_many_checkpoints_has_these_weights() -> None:
    values, decay, moving = [float(i % 7) for i in range(60)], 0.8, 0.0
    for value in values:
        moving = decay * moving + (1 - decay) * value
    weights = weights_of(len(values), "ema", decay)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert mean == pytest.approx(moving, rel=1e-5)
    assert weights_of(3, "uniform", decay) == [1, 1, 1] and weights_of(3, "linear", decay) == [1, 2, 3]


def test_a_window_of_steps_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [tmp_path / f"step-{n}" for n in (10, 20, 30, 40)]
    monkeypatch.setattr(average_weights, "complete", lambda folder: steps)
    assert chosen(tmp_path, None, (20, None)) == [(p, 1.0) for p in steps[1:]]
    assert chosen(tmp_path, 2, (None, 30), "linear") == [(steps[1], 1.0), (steps[2], 2.0)]
    assert chosen(tmp_path, 3, kind="ema", decay=0.5) == [(steps[1], 0.25), (steps[2], 0.5), (steps[3], 1.0)]
    for arguments, sentence in (
            ((5,), r"--last 5: must be at least 2, and at most the 4 complete checkpoints of \S+$"),
            ((None, (35, None)), "has 1 complete checkpoints between steps 35 and the last, and a mean"),
            ((None, (None, None), "ema", 0.0), "--decay 0.0: must lie above 0")):
        with pytest.raises(UserError, match=sentence):
            chosen(tmp_path, *arguments)  # type: ignore[arg-type]
