"""Learning rates, batch sizes and tokens of steps against closed forms, torch's schedulers, and counting."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import OptimConfig, PhaseConfig, RunConfig, TrainConfig
from megatron_sov.model.config.data import batch_size_at
from megatron_sov.schedules import Schedule, compute_decay_factor, describe_schedule_change

SCHEDULES = ("cosine", "wsd", "linear", "inverse_sqrt", "constant")


def run(num_steps: int, phases: tuple[PhaseConfig, ...] = (PhaseConfig("main", seq_len=8),),
        train: dict[str, Any] | None = None, **optim: Any) -> RunConfig:
    """Return a run of so many steps, at peak rate 1."""
    base = recipes.get("tiny-solar-open")
    config = OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **optim})
    return replace(base, data=replace(base.data, phases=phases), optim=config,
                   train=replace(TrainConfig(steps=num_steps, global_batch_size=8), **(train or {})))


def rates(num_steps: int, **settings: Any) -> list[float]:
    schedule = Schedule(run(num_steps, **settings))
    return [schedule.learning_rate(step) for step in range(num_steps)]


@pytest.mark.each("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert rates(20, schedule=schedule)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.each(("schedule", "scheduler", "settings"), [
    ("cosine", torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 16, "eta_min": 0.1}),
    ("linear", torch.optim.lr_scheduler.LinearLR,
     {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 16})])
def test_cosine_and_linear_are_torchs(schedule: str, scheduler: Any, settings: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = scheduler(optimizer, **settings)
    expected = []
    for _ in range(16):
        optimizer.step()
        torchs.step()
        expected.append(torchs.get_last_lr()[0])
    assert rates(20, schedule=schedule)[4:] == pytest.approx(expected)


def test_cosine_ends_at_the_minimum() -> None:
    assert rates(20, schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(20, schedule="cosine")[11] == pytest.approx(0.55)  # half way down: cos(pi / 2) = 0


@pytest.mark.each(("form", "left"), [("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
                                            ("cosine",
                                             [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(1, 6)]),
                                            ("one_minus_sqrt", [1 - math.sqrt(k / 5) for k in range(1, 6)])])
def test_wsd_is_constant_then_decays_in_its_form(form: str, left: list[float]) -> None:
    result = rates(20, schedule="wsd", decay_share=0.25, decay_form=form)
    assert result[3:15] == [1.0] * 12
    assert result[15:] == pytest.approx([0.1 + 0.9 * part for part in left])
    assert compute_decay_factor(form, 0.0) == 1.0 and compute_decay_factor(form, 1.0) == pytest.approx(0.0)


def test_inverse_square_root_is_that_of_the_transformer() -> None:
    """Vaswani et al. (arXiv 1706.03762), equation 3: proportional to min(step^-1/2, step warmup^-3/2)."""
    expected = [min(s ** -0.5, s * 4 ** -1.5) * 4 ** 0.5 for s in range(1, 101)]
    assert rates(100, schedule="inverse_sqrt", min_lr=0.0) == pytest.approx(expected)
    assert min(rates(1000, schedule="inverse_sqrt")) == pytest.approx(0.1)  # reached at step 400


def test_a_short_run_warms_up_for_half_of_it_at_most() -> None:
    assert rates(6, schedule="cosine", warmup_steps=2000)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates(1, schedule="cosine", warmup_steps=2000) == pytest.approx([0.1])


RAMP = {"ramp_from_batch_size": 2, "ramp_increment": 2, "ramp_steps": 6}
PHASES = (PhaseConfig("a", share=3, seq_len=8), PhaseConfig("b", share=2, seq_len=32, global_batch_size=4),
          PhaseConfig("c", share=1, seq_len=16))


def test_tokens_and_batch_sizes_equal_counting_step_by_step() -> None:
    config = run(24, phases=PHASES, train=RAMP)
    schedule, spent = Schedule(config), 0
    for step in range(24):
        phase = PHASES[sum(step >= start for start in config.phase_starts()) - 1]
        size = batch_size_at(config.train, phase, step)
        spent += size * phase.seq_len
        assert (schedule.get_stretch(step).batch_size, schedule.count_tokens(step)) == (size, spent)
        assert PHASES[schedule.get_stretch(step).phase] is phase


def test_token_schedules_follow_consumed_tokens() -> None:
    config = run(24, phases=PHASES, train=RAMP, schedule="linear", schedule_by="tokens",
                 warmup_tokens=96, min_lr=0.0)
    schedule = Schedule(config)
    end = schedule.count_tokens(23)
    for step in range(24):
        at = schedule.count_tokens(step)
        assert schedule.learning_rate(step) == pytest.approx(at / 96 if at <= 96
                                                             else 1 - (at - 96) / (end - 96))
    falls = [schedule.learning_rate(s) - schedule.learning_rate(s + 1) for s in (8, 14, 21)]
    assert falls == pytest.approx([64 / (end - 96), 128 / (end - 96), 128 / (end - 96)])


def test_a_phase_may_warm_up_again_or_have_its_own_schedule() -> None:
    plain = rates(24, phases=PHASES, schedule="wsd")
    own = replace(PHASES[2], lr=0.5, min_lr=0.02, schedule="linear", rewarm_steps=2)
    again = (PHASES[0], replace(PHASES[1], rewarm_steps=4), own)
    result = rates(24, phases=again, schedule="wsd")
    assert result[:12] == plain[:12] and result[16:20] == plain[16:20]
    assert result[12:16] == pytest.approx([value * k / 4 for k, value in enumerate(plain[12:16], 1)])
    assert result[20:] == pytest.approx([0.25, 0.5, 0.26, 0.02])  # up in two steps, down in two


def test_a_resumed_run_rewarms_at_configured_steps() -> None:
    plain, found = rates(24, schedule="cosine"), rates(24, schedule="cosine", rewarm=((10, 5),))
    assert found[:10] == plain[:10] and found[15:] == plain[15:]
    assert found[10:15] == pytest.approx([value * k / 5 for k, value in enumerate(plain[10:15], 1)])


def test_rates_depend_on_the_step_alone() -> None:
    """A resumed run gets the same rate at a step as an uninterrupted one."""
    config = run(24, phases=PHASES, train=RAMP, schedule="wsd", schedule_by="tokens", rewarm=((10, 5),))
    schedule = Schedule(config)
    in_order = [schedule.learning_rate(step) for step in range(24)]
    assert [Schedule(config).learning_rate(step) for step in reversed(range(24))] == in_order[::-1]


def test_a_changed_schedule_prints_its_learning_rates() -> None:
    short, long = run(6, schedule="cosine"), run(12, schedule="cosine")
    description = describe_schedule_change(short, long, 4)
    assert description is not None and "of 6 -> 12 steps" in description
    was, now = Schedule(short).learning_rate(4), Schedule(long).learning_rate(4)
    assert f"step 5 has the learning rate {now:.4g}; by the earlier settings it was {was:.4g}" in description
    assert describe_schedule_change(short, short, 4) is None
    assert describe_schedule_change(short, short, 6) is None
    own = replace(short.data.phases[0], lr=0.5)
    assert "step 5 has" in (describe_schedule_change(short, run(6, (own,), schedule="cosine"), 4) or "")
    with pytest.raises(UserError, match="make 6 steps, but the run has done 7; set at least 7"):
        describe_schedule_change(long, short, 7)
