"""How a curriculum becomes optimizer steps: token budgets, batch sizes, the batch size's ramp."""

from __future__ import annotations

from itertools import accumulate

from megatron_sov.config.data import DataConfig, PhaseConfig
from megatron_sov.config.train import TrainConfig


def batch_size_at(train: TrainConfig, phase: PhaseConfig, step: int) -> int:
    """Return the samples of step `step` (0-based) if it belongs to a phase.

    The ramp counts from the start of the run and grows towards `train.global_batch_size`;
    a phase of smaller batches caps it.
    """
    full = phase.global_batch_size or train.global_batch_size
    if step >= train.ramp_steps or not train.ramp_from_batch_size:
        return full
    stretches = -(-(train.global_batch_size - train.ramp_from_batch_size) // train.ramp_increment)
    return min(full, train.ramp_from_batch_size + step * stretches // train.ramp_steps * train.ramp_increment)


def ramp_changes(train: TrainConfig, phase: PhaseConfig) -> list[int]:
    """Return the steps at which the ramp changes the batch size."""
    sizes = [batch_size_at(train, phase, s) for s in range(train.ramp_steps + 1)]
    return [s for s in range(1, len(sizes)) if sizes[s] != sizes[s - 1]]


def phase_steps(data: DataConfig, train: TrainConfig) -> list[int]:
    """Return the optimizer steps of each phase.

    With `train.steps` the phases share those; else each phase lasts until its token budget (its own, or its
    share of `train.tokens`) is spent, the ramp counted in.
    """
    if train.steps:
        weights = [_full_steps(train, p, p.tokens) if p.tokens else p.share for p in data.phases]
        ends = [round(train.steps * passed / sum(weights)) for passed in accumulate(weights)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    total = sum(p.share for p in data.phases)
    budgets = [p.tokens or train.tokens * p.share / total for p in data.phases]
    steps: list[int] = []
    for phase, budget in zip(data.phases, budgets, strict=True):
        steps.append(_steps_for(train, phase, budget, sum(steps)))
    return steps


def _full_steps(train: TrainConfig, phase: PhaseConfig, tokens: float) -> float:
    return tokens / ((phase.global_batch_size or train.global_batch_size) * phase.seq_len)


def _steps_for(train: TrainConfig, phase: PhaseConfig, budget: float, first_step: int) -> int:
    """Return the steps that spend a phase's budget when it begins at `first_step`."""
    ramped, spent = 0, 0.0
    while first_step + ramped < train.ramp_steps and spent < budget:
        spent += batch_size_at(train, phase, first_step + ramped) * phase.seq_len
        ramped += 1
    return max(1, ramped + round(_full_steps(train, phase, max(0.0, budget - spent))))
