"""What is read: sources, curriculum, packing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, AtLeastOne, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, When,
    find_broken, is_set, is_unset)
from megatron_sov.model.config.bounds import Samples, SeqLen, Steps, Tokens
from megatron_sov.model.config.learning import NOT_EXTENDING, learns_without_rounds
from megatron_sov.model.config.train import Schedule, TrainConfig

_SOURCE = re.compile(r"\w[\w.-]*")


def named_shards(path: str) -> tuple[str, str]:
    """Return the name that a path of token shards, [NAME=]FOLDER, gives to their sources, and the folder; the
    name is "" where it gives none.

    Raises:
        UserError: no source can have the name.
    """
    name, equals, folder = path.partition("=")
    # a folder may have the sign in its own name
    if not equals or Path(path).exists():
        return "", path
    if not _SOURCE.fullmatch(name) or not folder:
        raise UserError(f"{path}: must be NAME=DIR, with a name of letters, digits, '.', '_' and '-'")
    return name, folder


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a curriculum: which sources are mixed, how long the samples are, and for how long."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "tokens share blend global_batch_size rewarm_steps lr": learns_without_rounds(),
        "share": is_unset(".tokens"),
        "min_lr schedule": is_set(".lr")}

    name: str
    """Name of the phase in events and in the report."""
    tokens: Tokens = 0
    """Token budget of the phase; 0: by `share`.  Either every phase has one or none."""
    share: AboveZero = 1.0
    """Part of the run that belongs to this phase, of `train.tokens` or of `train.steps`;
    normalised over all phases."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight (normalised); empty: as a mix has it for a phase of this name, else each artifact
    by its --data weight, its sources in proportion to their tokens.  NAME@N means the documents of NAME with
    at least N tokens, NAME/N all of them in pieces of at most N."""
    seq_len: SeqLen = 4096
    """Tokens of one sample.  rl: of one row; follows from rollout.max_prompt_tokens and
    rollout.max_new_tokens unless it is set or a recipe's is long enough."""
    global_batch_size: Samples = 0
    """Samples of one optimizer step in this phase; 0: `train.global_batch_size`."""
    rewarm_steps: Steps = 0
    """Steps over which the learning rate climbs anew from 0 when the phase begins."""
    lr: NotNegative = 0.0
    """Peak learning rate of a schedule of the phase's own, from its first step to its last; 0:
    the run's schedule goes on."""
    min_lr: NotNegative = 0.0
    """Where the phase's own schedule ends; 0: `optim.min_lr`."""
    schedule: Schedule | None = None
    """Form of the phase's own schedule; null: `optim.schedule`."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how documents become samples."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "packing": When("--data", lambda formats: "text" in formats, "holds plain text"),
        "over_long": When("--data", lambda formats: {*formats} != {"text"}, "holds conversations or pairs"),
        "phases": AnyOf(NOT_EXTENDING, is_unset("extend.stages"))}

    paths: dict[str, NotNegative] = field(default_factory=dict)
    """Token shard artifacts (`sov-data pack`) -> share of the data (normalised); given by
    --data [NAME=]DIR[:weight], where NAME names their sources."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """best_fit: documents stay whole unless they are longer than a sample, what does not fit is padding;
    concat: documents follow one another and are cut at the sample's end.  Conversations are always whole,
    pairs of them in one sample; see `over_long`."""
    over_long: Literal["cut", "drop", "refuse"] = "cut"
    """What becomes of conversations (and pairs) longer than a sample: cut: their tail is left out (of a pair
    that of the longer one first); drop: they are left out; refuse: the run does not start."""
    phases: Annotated[tuple[PhaseConfig, ...], MinLen(1)] = (PhaseConfig("main"),)
    """The curriculum, in order."""
    max_epochs: Annotated[float, Ge(0)] = 4.0
    """Passes over a source above which the run warns (more than about four help little: arXiv 2305.16264);
    above 20 passes too a run whose length nobody set is refused. 0: no limit."""
    skip_steps: tuple[tuple[AtLeastOne, AtLeastOne], ...] = ()
    """First and last optimizer step (1-based) of stretches whose samples are passed over
    without learning them."""
    prefetch_steps: Annotated[NotNegativeInt, Le(10_000)] = 2
    """Batches that are prepared ahead of the step, in a thread; 0: none."""
    heldout_tokens: NotNegativeInt = 65536
    """Held-out tokens of each source that an evaluation reads at most."""

    def max_seq_len(self) -> int:
        """Return the tokens of the longest sample of any phase."""
        return max(phase.seq_len for phase in self.phases)

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that these settings break by themselves."""
        p = []
        if len({bool(phase.tokens) for phase in self.phases}) > 1:
            p.append(SettingsProblem(ProblemCode.RULE, "data.phases",
                                     "some phases have a budget in tokens and some have "
                                     "none", way_out="give one to all or to none"))
        for i, phase in enumerate(self.phases):
            p += find_broken(
                phase, f"data.phases.{i}",
                (phase.min_lr <= phase.lr, "min_lr", f"must be at most the phase's lr = {phase.lr:g}"),
                (not phase.blend or any(phase.blend.values()), "blend", "has only zero weights",
                 "give at least one source a weight"))
        return p + find_broken(self, "data", (
            all(first <= last for first, last in self.skip_steps), "skip_steps",
            "must hold stretches [first, last] with first <= last"))


# How a curriculum becomes optimizer steps: token budgets, batch sizes, the batch size's ramp.

def batch_size_at(train: TrainConfig, phase: PhaseConfig, step: int) -> int:
    """Return the samples of step `step` (0-based) if it belongs to a phase.

    The ramp counts from the start of the run and grows towards `train.global_batch_size`;
    a phase of smaller batches caps it.
    """
    full = phase.global_batch_size or train.global_batch_size
    if step >= train.ramp_steps or not train.ramp_from_batch_size:
        return full
    # The ramp counts towards the run's batch size, not the phase's, so phases agree about where it is.
    stretches = -(-(train.global_batch_size - train.ramp_from_batch_size) // train.ramp_increment)
    return min(full, train.ramp_from_batch_size + step * stretches // train.ramp_steps * train.ramp_increment)


def nearest_multiple(number: int, unit: int) -> int:
    """Return the multiple of `unit` nearest to `number`, at least `unit`; of two as near the larger."""
    return max(1, (number + unit // 2) // unit) * unit


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
        # Ends are rounded, not lengths: the steps add up to `train.steps` exactly.
        ends = [round(train.steps * passed / sum(weights)) for passed in accumulate(weights)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    total = sum(p.share for p in data.phases)
    budgets = [p.tokens or train.tokens * p.share / total for p in data.phases]
    steps: list[int] = []
    for phase, budget in zip(data.phases, budgets, strict=True):
        # In order: where a phase begins decides how much of the ramp it sees.
        steps.append(_steps_for(train, phase, budget, sum(steps)))
    return steps


def phase_tokens(data: DataConfig, train: TrainConfig) -> list[int]:
    """Return the tokens of each phase: its budget, else those of its steps at the full batch size."""
    return [phase.tokens or steps * (phase.global_batch_size or train.global_batch_size) * phase.seq_len
            for phase, steps in zip(data.phases, phase_steps(data, train), strict=True)]


def _full_steps(train: TrainConfig, phase: PhaseConfig, tokens: float) -> float:
    return tokens / ((phase.global_batch_size or train.global_batch_size) * phase.seq_len)


def _steps_for(train: TrainConfig, phase: PhaseConfig, budget: float, first_step: int) -> int:
    """Return the steps that spend a phase's budget when it begins at `first_step`."""
    ramped, spent = 0, 0.0
    while first_step + ramped < train.ramp_steps and spent < budget:
        spent += batch_size_at(train, phase, first_step + ramped) * phase.seq_len
        ramped += 1
    return max(1, ramped + round(_full_steps(train, phase, max(0.0, budget - spent))))
