"""Training data settings: sources, curriculum phases and packing."""

import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, AtLeastOne, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, When,
    find_broken_rules, is_set, is_unset)
from megatron_sov.model.config.bounds import Samples, SeqLen, Steps, Tokens
from megatron_sov.model.config.learning import NOT_EXTENDING, has_no_rounds
from megatron_sov.model.config.train import Schedule, TrainConfig

_SOURCE = re.compile(r"\w[\w.-]*")


def split_source_name(path: str) -> tuple[str, str]:
    """Split [NAME=]FOLDER, a path of token shards, into source name and folder; the name is "" if absent.
    Raises `UserError`: NAME has characters that source names must not have."""
    name, equals, folder = path.partition("=")
    # An existing folder may have "=" in its name.
    if not equals or Path(path).exists():
        return "", path
    if not _SOURCE.fullmatch(name) or not folder:
        raise UserError(f"{path}: must be NAME=DIR; use letters, digits, '.', '_' and '-' in NAME")
    return name, folder


@dataclass(frozen=True)
class PhaseConfig:
    """A curriculum phase: its length, source mixture, sample length and learning rate."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "tokens share blend global_batch_size rewarm_steps lr": has_no_rounds(),
        "share": is_unset(".tokens"),
        "min_lr schedule": is_set(".lr")}

    name: str
    """Phase name in events.jsonl and in the report."""
    tokens: Tokens = 0
    """Token budget. 0: the phase's length follows from `share`. Give a budget to all phases or to none."""
    share: AboveZero = 1.0
    """Share of `train.tokens` or `train.steps` for this phase, relative to the other phases' shares."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight (normalised). NAME@N selects documents with at least N tokens; NAME/N splits
    documents into pieces with at most N tokens. Empty: the mixture file's weights for this phase name, else
    the --data weights, with sources in proportion to their tokens."""
    seq_len: SeqLen = 4096
    """Tokens per sample. rl: tokens per packed row; by default long enough for `rollout.max_prompt_tokens` +
    `rollout.max_new_tokens`."""
    global_batch_size: Samples = 0
    """Samples per optimizer step in this phase. 0: `train.global_batch_size`."""
    rewarm_steps: Steps = 0
    """Optimizer steps at the phase's start in which the learning rate rises from 0 again."""
    lr: NotNegative = 0.0
    """Peak learning rate in a separate schedule for this phase, from its first to its last step. 0: continue
    the run's schedule."""
    min_lr: NotNegative = 0.0
    """Final learning rate in the phase's schedule. 0: `optim.min_lr`."""
    schedule: Schedule | None = None
    """The phase's schedule. null: `optim.schedule`."""


@dataclass(frozen=True)
class DataConfig:
    """Training data, and how documents are packed into samples."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "packing": When("--data", lambda formats: "text" in formats, "holds plain text"),
        "over_long": When("--data", lambda formats: {*formats} != {"text"}, "holds conversations or pairs"),
        "phases": AnyOf(NOT_EXTENDING, is_unset("extend.stages"))}

    paths: dict[str, NotNegative] = field(default_factory=dict)
    """Token shard folders (`sov-data pack`) -> data share (normalised); set by --data [NAME=]DIR[:weight],
    where NAME renames the folder's sources."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """best_fit: keep documents whole if they fit into a sample, and pad the remaining sample; concat:
    concatenate documents and cut at sample ends. Conversations always stay whole, and a pair shares a sample
    (see `over_long`)."""
    over_long: Literal["cut", "drop", "refuse"] = "cut"
    """Action for conversations and pairs longer than a sample. cut: truncate at the end (a pair's longer
    response first); drop: leave them out; refuse: stop before training starts."""
    phases: Annotated[tuple[PhaseConfig, ...], MinLen(1)] = (PhaseConfig("main"),)
    """Curriculum phases in order."""
    max_epochs: Annotated[float, Ge(0)] = 4.0
    """Passes over a source above which the run warns, because more than about four passes help little (arXiv
    2305.16264). A longer run than 20 passes (200, if you set its length) is rejected. 0: no limit."""
    skip_steps: tuple[tuple[AtLeastOne, AtLeastOne], ...] = ()
    """Ranges [first, last] of optimizer steps (from 1) whose samples are skipped."""
    prefetch_steps: Annotated[NotNegativeInt, Le(10_000)] = 2
    """Batches prepared ahead in a background thread. 0: prepare each batch when it is needed."""
    heldout_tokens: NotNegativeInt = 65536
    """Maximum held-out tokens per source in an evaluation."""

    def max_seq_len(self) -> int:
        """Return the longest sample length of all phases, in tokens."""
        return max(phase.seq_len for phase in self.phases)

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between these settings."""
        problems = []
        if len({bool(phase.tokens) for phase in self.phases}) > 1:
            problems.append(SettingsProblem(
                ProblemCode.RULE, "data.phases", "some phases have a budget in tokens and some have none",
                way_out="set tokens in all phases or in none"))
        for i, phase in enumerate(self.phases):
            problems += find_broken_rules(
                phase, f"data.phases.{i}",
                (phase.min_lr <= phase.lr, "min_lr", f"must be at most the phase's lr = {phase.lr:g}"),
                (not phase.blend or any(phase.blend.values()), "blend", "has only zero weights",
                 "give at least one source a weight"))
        return problems + find_broken_rules(self, "data", (
            all(first <= last for first, last in self.skip_steps), "skip_steps",
            "must contain ranges [first, last] with first <= last"))


def batch_size_at(train: TrainConfig, phase: PhaseConfig, step: int) -> int:
    """Return the global batch size (samples) of the 0-based optimizer step `step` in `phase`.

    The batch size ramp counts from the start of the run and grows towards `train.global_batch_size`; a phase
    with smaller batches caps it.
    """
    full = phase.global_batch_size or train.global_batch_size
    if step >= train.ramp_steps or not train.ramp_from_batch_size:
        return full
    # The ramp aims at the run's batch size, not the phase's, so that it is the same in all phases.
    increments = -(-(train.global_batch_size - train.ramp_from_batch_size) // train.ramp_increment)
    grown = step * increments // train.ramp_steps * train.ramp_increment
    return min(full, train.ramp_from_batch_size + grown)


def nearest_multiple(number: int, unit: int) -> int:
    """Return the multiple of `unit` nearest to `number`, at least `unit`; ties go to the larger multiple."""
    return max(1, (number + unit // 2) // unit) * unit


def find_ramp_changes(train: TrainConfig, phase: PhaseConfig) -> list[int]:
    """Return the steps at which the ramp changes the batch size."""
    sizes = [batch_size_at(train, phase, step) for step in range(train.ramp_steps + 1)]
    return [step for step in range(1, len(sizes)) if sizes[step] != sizes[step - 1]]


def phase_steps(data: DataConfig, train: TrainConfig) -> list[int]:
    """Return the optimizer steps for each phase.

    If `train.steps` is set, phases divide it; otherwise each phase lasts until its token budget (or its share
    of `train.tokens`) is spent, with the smaller batches of the ramp counted.
    """
    if train.steps:
        weights = [_full_steps(train, p, p.tokens) if p.tokens else p.share for p in data.phases]
        # Round the ends of phases, not their lengths, so that steps add up to `train.steps` exactly.
        ends = [round(train.steps * weight / sum(weights)) for weight in accumulate(weights)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    total = sum(p.share for p in data.phases)
    budgets = [p.tokens or train.tokens * p.share / total for p in data.phases]
    steps: list[int] = []
    for phase, budget in zip(data.phases, budgets, strict=True):
        # The first step of a phase decides how much of the batch size ramp falls into it.
        steps.append(_steps_for(train, phase, budget, sum(steps)))
    return steps


def phase_tokens(data: DataConfig, train: TrainConfig) -> list[int]:
    """Return the tokens for each phase: its budget, else its steps at the full batch size."""
    return [phase.tokens or steps * (phase.global_batch_size or train.global_batch_size) * phase.seq_len
            for phase, steps in zip(data.phases, phase_steps(data, train), strict=True)]


def _full_steps(train: TrainConfig, phase: PhaseConfig, tokens: float) -> float:
    return tokens / ((phase.global_batch_size or train.global_batch_size) * phase.seq_len)


def _steps_for(train: TrainConfig, phase: PhaseConfig, budget: float, first_step: int) -> int:
    """Return the steps in which a phase that begins at `first_step` spends `budget` tokens."""
    ramped, spent = 0, 0.0
    while first_step + ramped < train.ramp_steps and spent < budget:
        spent += batch_size_at(train, phase, first_step + ramped) * phase.seq_len
        ramped += 1
    return max(1, ramped + round(_full_steps(train, phase, max(0.0, budget - spent))))
