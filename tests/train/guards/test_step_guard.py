"""Rejected steps: non-finite numbers, and spikes by OLMo-core's rule, with their entries in the ledger."""

import math
import random
from typing import Any

import pytest
import torch

from megatron_sov.engine.parallel import world
from megatron_sov.model.config import GuardConfig, ParallelConfig
from megatron_sov.train.data.ledger import Ledger, LedgerEntry
from megatron_sov.train.guards import step_guard
from megatron_sov.train.guards.step_guard import StepGuard

LEDGER = Ledger([LedgerEntry(0, "a", 32, 8, {"x": 1.0}), LedgerEntry(60, "b", 64, 8, {"x": 1.0}),
                 LedgerEntry(70, "c", 64, 16, {"x": 1.0})])


@pytest.fixture(autouse=True)
def _without_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace sums over processes by the values of this process."""
    monkeypatch.setattr(step_guard.collectives, "all_reduce_world", lambda values: values)


def accept_by_olmo_rule(losses: list[float], norms: list[float], window: int, sigma: float) -> bool:
    """Apply OLMo-core's one-sided rule: new values must be below mean + sigma * std of the earlier values."""
    if len(losses) < max(20, window // 2) + 1:
        return True
    for values in (losses, norms):
        *earlier, new = values[-window - 1:]
        history = torch.tensor(earlier, dtype=torch.float64)
        if not bool(new <= history.mean() + sigma * history.std()):
            return False
    return True


def test_spikes_are_those_of_the_rule() -> None:
    draw = random.Random(3)
    guard = StepGuard(GuardConfig(window_steps=40, sigma=4.0), is_main=True)
    losses: list[float] = []
    norms: list[float] = []
    rejected_steps = []
    for step in range(400):
        loss, norm = draw.gauss(3, 0.1), draw.gauss(1, 0.05)
        if step > 20 and step % 9 == 0:
            loss, norm = draw.choice([(loss + draw.uniform(0, 2), norm), (loss, norm + draw.uniform(0, 1)),
                                      (2.0, 0.5)])
        expected = accept_by_olmo_rule([*losses, loss], [*norms, norm], 40, 4.0)
        assert guard.accept_step(loss, norm) == expected, step
        losses.append(loss)
        norms.append(norm)
        if not expected:
            rejected_steps.append(step)
    assert len(rejected_steps) > 10 and min(rejected_steps) >= 20


@pytest.mark.parametrize(("loss", "norm", "reason"), [
    (math.nan, 1.0, "the loss is nan"), (2.0, math.inf, "the gradient norm is inf")])
def test_non_finite_values_are_rejected_from_the_first_step(loss: float, norm: float, reason: str) -> None:
    guard = StepGuard(GuardConfig(), is_main=True)
    assert not guard.accept_step(loss, norm)
    assert guard.rejection is not None and guard.rejection.reason == reason and not guard.rejection.finite
    assert guard.accept_step(2.0, 1.0) and guard.rejection is None and guard.consecutive_rejections == 0


def build_steady_guard(settings: GuardConfig, steps: int) -> StepGuard:
    """Return a guard that has accepted `steps` steps with nearly constant values."""
    guard = StepGuard(settings, is_main=True)
    assert all(guard.accept_step(2.0 + 0.1 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(steps))
    return guard


def test_incomparable_losses_are_not_spikes_but_gradients_are() -> None:
    guard = StepGuard(GuardConfig(), is_main=True)
    guard.compares_losses = False
    assert all(guard.accept_step((-1) ** i * 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(100))
    assert guard.accept_step(9.0, 1.0) and not guard.accept_step(0.0, 9.0)
    assert not guard.accept_step(math.nan, 1.0)


def test_high_losses_in_a_row_are_counted_and_the_history_survives_a_checkpoint() -> None:
    settings = GuardConfig(rollback_after_skips=2)
    guard = build_steady_guard(settings, 100)
    restored = StepGuard(settings, is_main=True)
    restored.restore(guard.state())
    for g in (guard, restored):
        assert not g.accept_step(9.0, 1.0) and not g.wants_rollback
        assert not g.accept_step(9.0, 1.0) and g.wants_rollback and g.consecutive_rejections == 2
    assert guard.state() == restored.state()
    guard.reset_rejections()
    assert not guard.wants_rollback
    assert not StepGuard(GuardConfig(rollback_after_skips=0), is_main=True).wants_rollback


def test_persistently_large_gradients_are_accepted_without_rollback() -> None:
    guard = build_steady_guard(GuardConfig(rollback_after_skips=2), 128)
    decisions = [guard.accept_step(2.0, 5.0) or guard.wants_rollback for _ in range(6)]
    # k equal spikes in a window of n lie sqrt((n - k) / k) standard deviations above its mean:
    # more than 6 up to k = 3
    assert decisions == [False] * 4 + [True] * 2 and guard.consecutive_rejections == 0
    assert not guard.wants_rollback


def test_spike_history_restarts_when_the_data_change() -> None:
    guard = StepGuard(GuardConfig(window_steps=20), is_main=True)
    for step in range(60):
        guard.begin_step(step, LEDGER)
        assert guard.accept_step(2.0 + 0.01 * (step % 3), 1.0)
    guard.begin_step(60, LEDGER)
    assert guard.accept_step(3.0, 2.0), "samples of another length may have another loss"
    for step in range(61, 90):
        guard.begin_step(step, LEDGER)
        assert guard.accept_step(3.0 + 0.01 * (step % 3), 2.0)
    assert len(guard.state()["losses"]) == 20, "another batch size alone does not restart it"


def test_without_skipping_a_spike_is_accepted_and_a_nan_still_rejected() -> None:
    guard = StepGuard(GuardConfig(skip=False, window_steps=20), is_main=True)
    assert all(guard.accept_step(2.0, 1.0) for _ in range(30)) and guard.accept_step(99.0, 1.0)
    assert not guard.accept_step(math.nan, 1.0)


def guard_with_one_nan() -> list[Any]:
    """Inside ranks: take a step with a NaN on rank 1 only; return each rank's decisions and stored state."""
    place = world.join_world(ParallelConfig())
    guard = StepGuard(GuardConfig(), place.is_main)
    is_first_accepted = guard.accept_step(2.0 + 1e-9 * place.rank, 1.0)
    is_second_accepted = guard.accept_step(math.nan if place.rank == 1 else 2.0, 1.0)
    return [is_first_accepted, is_second_accepted, guard.state()["losses"], guard.consecutive_rejections]


@pytest.mark.distributed
def test_one_rejecting_process_decides_for_all(ranks: Any, job: Any) -> None:
    (decisions,) = ranks(job(__file__, "guard_with_one_nan", 2))
    assert decisions == [[True, False, [2.0], 1]] * 2
