"""What every optimizer step of a run will be: its phase, batch size, tokens and learning rate, as functions
of the step alone.

So a run that is resumed, at whatever step and layout, goes on at the rate that it would have had.
"""

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


def compute_decay_factor(form: str, done: float) -> float:
    """Return what is left of a decay, from 1 to 0, when the share `done` of it has passed.

    Args:
        form: linear: 1 - t; cosine: (1 + cos(pi t)) / 2 (arXiv 1608.03983); one_minus_sqrt: 1 - sqrt(t)
            (arXiv 2405.18392).
        done: t in [0, 1].
    """
    if form == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - math.sqrt(done) if form == "one_minus_sqrt" else 1 - done


def compute_learning_rate(optim: OptimConfig, at: int, end: int, warmup: int) -> float:
    """Return the learning rate at a place of a run, counted in steps or in tokens.

    A linear warm-up (over half the run at most), then by `optim.schedule`:
    cosine, linear: decay to `min_lr` over the rest; wsd: constant, then decay in `decay_form` over the last
    `decay_share`, all that follows the warm-up at most (MiniCPM, arXiv 2404.06395); inverse_sqrt: lr
    sqrt(warmup / at) (arXiv 1706.03762), not below `min_lr`; constant.

    Args:
        optim: the schedule's settings.
        at: steps or tokens up to the end of this step, at least 1.
        end: steps or tokens of the run.
        warmup: steps or tokens of the warm-up.
    """
    warmup = min(warmup, end // 2)
    # `at` counts the step itself, so the first step has lr / warmup, not 0.
    if at <= warmup:
        return optim.lr * at / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(1, warmup) / at))
    if optim.schedule == "wsd":
        # At most what follows the warm-up, so the rate never jumps at their border.
        decay = max(1, min(round(end * optim.decay_share), end - warmup))
        form, done = optim.decay_form, max(0.0, (at - (end - decay)) / decay)
    else:
        form, done = optim.schedule, (at - warmup) / max(1, end - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * compute_decay_factor(form, done)


def _turns(optim: OptimConfig, end: int, warmup: int) -> list[int]:
    """Return the steps or tokens after which the warm-up is over and a `wsd` decay begins."""
    warmup = min(warmup, end // 2)
    return ([warmup, max(warmup, end - round(end * optim.decay_share))] if optim.schedule == "wsd"
            else [warmup])


@dataclass(frozen=True)
class Stretch:
    """Steps of the same phase and batch size."""

    first_step: int
    """0-based."""
    phase: int
    """Number of the phase."""
    batch_size: int
    """Samples of a step."""
    seq_len: int
    """Tokens of a sample."""
    tokens_before: int
    """Tokens of all steps before, padding counted in."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, padding counted in."""
        return self.batch_size * self.seq_len


class Schedule:
    """Phase, batch size, tokens and learning rate of every step of a run."""

    def __init__(self, config: RunConfig) -> None:
        self._optim, self._train, self.phases = config.optim, config.train, config.data.phases
        self._starts = config.phase_starts()
        self.num_steps = config.num_steps()
        """Optimizer steps of the run."""
        self.stretches: list[Stretch] = []
        """In order, the ramp's as well."""
        for first in self._changes():
            phase = bisect.bisect_right(self._starts, first) - 1
            # Uses the stretches so far: they are made in order, and each knows the tokens before it.
            before = self.count_tokens(first - 1) if first else 0
            self.stretches.append(Stretch(first, phase,
                                          data.batch_size_at(config.train, self.phases[phase], first),
                                          self.phases[phase].seq_len, before))

    def _changes(self) -> list[int]:
        """Return the steps at which a phase begins or the batch size changes."""
        ends = [*self._starts[1:], self.num_steps]
        # A phase of no steps has no stretch: a step belongs to one phase.
        found = {start for start, end in zip(self._starts, ends, strict=True) if start < end}
        for phase, start, end in zip(self.phases, self._starts, ends, strict=True):
            found |= {s for s in data.find_ramp_changes(self._train, phase) if start < s < end}
        return sorted(found)

    def get_stretch(self, step: int) -> Stretch:
        """Return the stretch that step `step` (0-based) belongs to."""
        # The last stretch that begins at or before the step.
        return self.stretches[bisect.bisect_right(self.stretches, step, key=lambda s: s.first_step) - 1]

    def count_tokens(self, step: int) -> int:
        """Return the tokens of all steps up to the end of step `step`, padding counted in."""
        stretch = self.get_stretch(step)
        return stretch.tokens_before + (step + 1 - stretch.first_step) * stretch.tokens_per_step

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (0-based).

        The run's schedule passes over all phases; one with a rate of its own has a schedule of its
        own inside the phase.
        """
        number = self.get_stretch(step).phase
        phase, start = self.phases[number], self._starts[number]
        if phase.lr:
            value = compute_learning_rate(self._own(phase), step - start + 1, self._end(number) - start,
                                          phase.rewarm_steps)
        elif self._optim.schedule_by == "tokens":
            value = compute_learning_rate(self._optim, self.count_tokens(step),
                                          self.count_tokens(self.num_steps - 1), self._optim.warmup_tokens)
        else:
            value = compute_learning_rate(self._optim, step + 1, self.num_steps, self._optim.warmup_steps)
        # A phase with a rate of its own has used `rewarm_steps` as its warm-up above.
        rewarmed = [(start, phase.rewarm_steps)] if not phase.lr else []
        # A factor on the schedule, so that the schedule itself does not depend on when a run was
        # interrupted.
        for first, steps in (*rewarmed, *self._optim.rewarm):
            if first <= step < first + steps:
                value *= (step + 1 - first) / steps
        return value

    def list_turning_steps(self) -> list[int]:
        """Return the steps (0-based) at which a warm-up is over or a decay begins."""
        optim = self._optim
        if optim.schedule_by == "tokens":
            # Tokens grow with the step, so a binary search finds the step of a token count.
            places = _turns(optim, self.count_tokens(self.num_steps - 1), optim.warmup_tokens)
            found = [bisect.bisect_right(range(self.num_steps), place, key=self.count_tokens)
                     for place in places]
        else:
            found = _turns(optim, self.num_steps, optim.warmup_steps)
        for number, (phase, start) in enumerate(zip(self.phases, self._starts, strict=True)):
            if phase.lr:
                found += [start + t for t in _turns(self._own(phase), self._end(number) - start,
                                                    phase.rewarm_steps)]
            elif phase.rewarm_steps:
                found.append(start + phase.rewarm_steps)
        return [turn for turn in (*found, *(first + steps for first, steps in optim.rewarm))
                if turn < self.num_steps]

    def _own(self, phase: PhaseConfig) -> OptimConfig:
        """Return the settings of a phase's own schedule."""
        return replace(self._optim, lr=phase.lr, min_lr=min(phase.lr, phase.min_lr or self._optim.min_lr),
                       schedule=phase.schedule or self._optim.schedule)

    def _end(self, phase: int) -> int:
        return self._starts[phase + 1] if phase + 1 < len(self._starts) else self.num_steps


def describe_schedule_change(before: RunConfig, now: RunConfig, done: int) -> str | None:
    """Return what a run that goes on with other settings should know about its learning rate; None where it
    is what it would have been.

    Args:
        before: the settings that the run went by so far.
        now: those that it goes on with.
        done: steps that it has done.

    Raises:
        UserError: it has done more steps than are asked for now.
    """
    old, new = Schedule(before), Schedule(now)
    if new.num_steps < done:
        raise UserError(f"train.steps: the settings now make {new.num_steps} steps, and the run has done "
                        f"{done}; ask for at least {done}, or start a new --run --from an earlier checkpoint")
    if done in (new.num_steps, 0):
        return None
    # Compared at the next step: what lies behind cannot change any more.
    was, is_ = old.learning_rate(min(done, old.num_steps - 1)), new.learning_rate(done)
    if math.isclose(was, is_, rel_tol=1e-6):
        return None
    steps = f" of {old.num_steps} -> {new.num_steps} steps" if old.num_steps != new.num_steps else ""
    return (f"the schedule{steps} is another one than before: step {done + 1} has the learning rate "
            f"{is_:.4g}, by the earlier settings {was:.4g}")
