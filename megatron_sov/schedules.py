"""Learning rate, batch size, phase and tokens of every optimizer step, computed from the step alone: a
resumed run continues with the same learning rate at any layout."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import data

if TYPE_CHECKING:
    from megatron_sov.model.config.data import PhaseConfig
    from megatron_sov.model.config.run import RunConfig
    from megatron_sov.model.config.train import OptimConfig


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps with the same phase and batch size."""

    first_step: int
    """0-based."""
    phase: int
    """Index in `data.phases`."""
    batch_size: int
    """Samples per step."""
    seq_len: int
    """Tokens per sample."""
    tokens_before: int
    """Tokens in earlier steps, including padding."""

    @property
    def tokens_per_step(self) -> int:
        """`batch_size * seq_len`, including padding."""
        return self.batch_size * self.seq_len


class Schedule:
    """Phase, batch size, tokens and learning rate for every step in a run."""

    def __init__(self, config: RunConfig) -> None:
        self._optim, self._train, self.phases = config.optim, config.train, config.data.phases
        self._starts = config.phase_starts()
        self.num_steps = config.num_steps()
        self.stretches: list[Stretch] = []
        for first in self._list_first_steps():
            phase = bisect.bisect_right(self._starts, first) - 1
            # `count_tokens` reads the stretches that are already in the list
            tokens_before = self.count_tokens(first - 1) if first else 0
            batch_size = data.batch_size_at(config.train, self.phases[phase], first)
            self.stretches.append(
                Stretch(first, phase, batch_size, self.phases[phase].seq_len, tokens_before))

    def _list_first_steps(self) -> list[int]:
        """Return the steps where a phase begins or the batch size changes."""
        ends = [*self._starts[1:], self.num_steps]
        # a phase without steps has no stretch
        changes = {start for start, end in zip(self._starts, ends, strict=True) if start < end}
        for phase, start, end in zip(self.phases, self._starts, ends, strict=True):
            changes |= {step for step in data.find_ramp_changes(self._train, phase) if start < step < end}
        return sorted(changes)

    def get_stretch(self, step: int) -> Stretch:
        """Return the `Stretch` that contains `step` (0-based)."""
        return self.stretches[bisect.bisect_right(self.stretches, step, key=lambda s: s.first_step) - 1]

    def count_tokens(self, step: int) -> int:
        """Count the tokens from step 0 through `step`, including padding."""
        stretch = self.get_stretch(step)
        return stretch.tokens_before + (step + 1 - stretch.first_step) * stretch.tokens_per_step

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at `step` (0-based), by the phase's schedule if the phase sets `lr`,
        otherwise by the run's schedule over all phases."""
        number = self.get_stretch(step).phase
        phase, start = self.phases[number], self._starts[number]
        rewarmed = [] if phase.lr else [(start, phase.rewarm_steps)]
        if phase.lr:
            value = compute_learning_rate(self._build_phase_optim(phase), step - start + 1,
                                          self._get_phase_end(number) - start, phase.rewarm_steps)
        elif self._optim.schedule_by == "tokens":
            value = compute_learning_rate(self._optim, self.count_tokens(step),
                                          self.count_tokens(self.num_steps - 1), self._optim.warmup_tokens)
        else:
            value = compute_learning_rate(self._optim, step + 1, self.num_steps, self._optim.warmup_steps)
        # Re-warming multiplies the scheduled rate: the schedule must not depend on earlier interruptions.
        for first, steps in (*rewarmed, *self._optim.rewarm):
            if first <= step < first + steps:
                value *= (step + 1 - first) / steps
        return value

    def list_turning_steps(self) -> list[int]:
        """Return the steps (0-based) where a warm-up ends or a decay begins."""
        optim = self._optim
        if optim.schedule_by == "tokens":
            token_counts = _list_turning_points(optim, self.count_tokens(self.num_steps - 1),
                                                optim.warmup_tokens)
            turns = [bisect.bisect_right(range(self.num_steps), count, key=self.count_tokens)
                     for count in token_counts]
        else:
            turns = _list_turning_points(optim, self.num_steps, optim.warmup_steps)
        for number, (phase, start) in enumerate(zip(self.phases, self._starts, strict=True)):
            if phase.lr:
                length = self._get_phase_end(number) - start
                points = _list_turning_points(self._build_phase_optim(phase), length, phase.rewarm_steps)
                turns += [start + point for point in points]
            elif phase.rewarm_steps:
                turns.append(start + phase.rewarm_steps)
        turns += [first + steps for first, steps in optim.rewarm]
        return [turn for turn in turns if turn < self.num_steps]

    def _build_phase_optim(self, phase: PhaseConfig) -> OptimConfig:
        return replace(self._optim, lr=phase.lr, min_lr=min(phase.lr, phase.min_lr or self._optim.min_lr),
                       schedule=phase.schedule or self._optim.schedule)

    def _get_phase_end(self, phase: int) -> int:
        return self._starts[phase + 1] if phase + 1 < len(self._starts) else self.num_steps


def compute_learning_rate(optim: OptimConfig, at: int, end: int, warmup: int) -> float:
    """Compute the learning rate at a position in a run, in steps or in tokens.

    A linear warm-up over at most half of the run, then by `optim.schedule`:
    cosine, linear: decay to `min_lr` over the rest; wsd: constant, then decay in `decay_form` over the last
    `decay_share`, at most until the warm-up (MiniCPM, arXiv 2404.06395); inverse_sqrt: lr
    sqrt(warmup / at) (arXiv 1706.03762), at least `min_lr`; constant.

    Args:
        optim: settings of the schedule.
        at: steps or tokens until the end of this step, at least 1.
        end: steps or tokens of the run.
        warmup: steps or tokens of the warm-up.
    """
    warmup, decay = bound_lengths(optim, end, warmup)
    # `at` includes the step itself: the first step has lr / warmup, not 0
    if at <= warmup:
        return optim.lr * at / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(1, warmup) / at))
    if optim.schedule == "wsd":
        form, progress = optim.decay_form, max(0.0, (at - (end - decay)) / decay)
    else:
        form, progress = optim.schedule, (at - warmup) / max(1, end - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * compute_decay_factor(form, progress)


def bound_lengths(optim: OptimConfig, end: int, warmup: int) -> tuple[int, int]:
    """Return the lengths of the warm-up and of a `wsd` decay (0: none) in a run of `end` steps or tokens."""
    warmup = min(warmup, end // 2)
    if optim.schedule != "wsd":
        return warmup, 0
    # a decay that began during the warm-up would make the rate jump at the end of the warm-up
    return warmup, max(1, min(round(end * optim.decay_share), end - warmup))


def compute_decay_factor(form: str, progress: float) -> float:
    """Compute the remaining factor in a decay, from 1 to 0.

    Args:
        form: linear: 1 - t; cosine: (1 + cos(pi t)) / 2 (arXiv 1608.03983); one_minus_sqrt: 1 - sqrt(t)
            (arXiv 2405.18392).
        progress: t in [0, 1].
    """
    if form == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - math.sqrt(progress) if form == "one_minus_sqrt" else 1 - progress


def _list_turning_points(optim: OptimConfig, end: int, warmup: int) -> list[int]:
    """Return the steps or tokens where the warm-up ends and a `wsd` decay begins."""
    warmup, decay = bound_lengths(optim, end, warmup)
    return [warmup, end - decay] if decay else [warmup]


def describe_schedule_change(before: RunConfig, now: RunConfig, done: int) -> str | None:
    """Describe how changed settings change the next learning rate in a continued run; None: unchanged.

    Args:
        before: settings of the run until now.
        now: settings of the continuation.
        done: completed steps.

    Raises:
        UserError: `now` has fewer steps than `done`.
    """
    old, new = Schedule(before), Schedule(now)
    if new.num_steps < done:
        raise UserError(f"train.steps: the settings make {new.num_steps} steps, but the run has done {done}; "
                        f"set at least {done}, or start a new --run --from an earlier checkpoint")
    if done in (new.num_steps, 0):
        return None
    old_lr, new_lr = old.learning_rate(min(done, old.num_steps - 1)), new.learning_rate(done)
    if math.isclose(old_lr, new_lr, rel_tol=1e-6):
        return None
    steps = f" of {old.num_steps} -> {new.num_steps} steps" if old.num_steps != new.num_steps else ""
    return (f"the schedule{steps} has changed: step {done + 1} has the learning rate {new_lr:.4g}; by the "
            f"earlier settings it was {old_lr:.4g}")
