"""Learning rates against closed forms and torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sov.config import OptimConfig
from megatron_sov.train.schedules import learning_rate


def rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **settings})  # type: ignore[arg-type]
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert rates(20, schedule=schedule)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_is_torchs_annealing_and_ends_at_the_minimum() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.1)
    expected = []
    for _ in range(16):
        optimizer.step()
        torchs.step()
        expected.append(torchs.get_last_lr()[0])
    assert rates(20, schedule="cosine")[4:] == pytest.approx(expected)
    assert rates(20, schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(20, schedule="cosine")[11] == pytest.approx(0.55)  # half way down: cos(pi / 2) = 0


def test_wsd_is_constant_then_linear() -> None:
    found = rates(20, schedule="wsd", decay_share=0.25)
    assert found[3:15] == [1.0] * 12
    assert found[15:] == pytest.approx([1.0 - 0.9 * k / 5 for k in range(1, 6)])


def test_a_run_that_only_decays_goes_down_evenly_from_the_peak() -> None:
    """As in mid-training --from another run: the rate is warmed up again, then falls by the same amount each step."""
    found = rates(20, schedule="wsd", decay_share=1.0)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *(1.0 - 0.9 * k / 16 for k in range(1, 17))])


def test_constant_stays() -> None:
    assert set(rates(20, schedule="constant")[3:]) == {1.0}


def test_a_short_run_warms_up_for_half_of_it_at_most() -> None:
    assert rates(6, schedule="cosine", warmup_steps=2000)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates(1, schedule="cosine", warmup_steps=2000) == pytest.approx([0.1])


def test_no_rate_leaves_the_range() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        for num_steps in (1, 2, 3, 7, 50):
            for rate in rates(num_steps, schedule=schedule, decay_share=1.0):
                assert 0 < rate <= 1.0 and math.isfinite(rate)
