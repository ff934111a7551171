"""Context extension and mid-training: stages one after the other, and the gate that ends each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sov.config.bounds import MAX_BATCH_SIZE, MAX_SEQ_LEN, MAX_STEPS, MAX_TOKENS, above
from megatron_sov.config.model import STRICT

PARTS = {"extension": ("long", "rehearsal"), "midtraining": ("trajectories", "long", "replay")}
"""Kind of a stage -> the parts that its samples may have, beside the rest."""


@dataclass(frozen=True)
class PartConfig:
    """A part of a stage's samples with a share of its own."""

    __pydantic_config__ = STRICT
    name: Literal["long", "rehearsal", "trajectories", "replay"]
    """long: documents longer than what was trained on; rehearsal (extension) and replay (midtraining):
    documents in pieces as short as those of the phases before; trajectories (midtraining):
    a query with its solutions."""
    share: float
    """Part of the stage's samples, needle documents not counted."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source name -> weight, as in `data.phases`; NAME@N: documents of at least N tokens, NAME/N: documents
    in pieces of at most N.  Empty: long, every text source's documents longer than the trained length;
    rehearsal and replay, every text source in pieces of the trained length; trajectories,
    every source of chats."""


@dataclass(frozen=True)
class ExtendStageConfig:
    """One stage of `extend`, a run of its own."""

    __pydantic_config__ = STRICT
    name: str
    """Name of the stage: its phase in the report and, but for the last stage, its folder
    RUN/stages/<number>-<name>."""
    seq_len: int
    """Tokens of one sample."""
    kind: Literal["extension", "midtraining"] = "extension"
    """What the samples are made of: see `parts`."""
    steps: int = 0
    """Optimizer steps before the gate may end the stage; 0: from `tokens`, or `train.steps` without those."""
    tokens: int = 0
    """The same as a budget in tokens; used when `steps` is 0."""
    max_steps: int = 0
    """Optimizer steps after which a stage whose gate has not passed is given up; 0: `steps`."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source name -> weight of the samples that no part takes; empty: each source by its own share."""
    parts: tuple[PartConfig, ...] = ()
    """Parts with a share of their own."""
    global_batch_size: int = 0
    """Samples of one optimizer step; 0: `train.global_batch_size`."""
    lr: float = 0.0
    """Peak learning rate; 0: `optim.lr`."""
    rope_theta: float = 0.0
    """New base of the rotary frequencies, for models whose layers are all global; 0: as it was."""
    yarn_factor: float = 0.0
    """How far YaRN stretches the original context, for models whose layers are all global; 1: not at all; 0:
    new / original length, or not at all where `rope_theta` changes the base instead."""
    yarn_original_tokens: int = 0
    """Context that YaRN stretches, where a released config names another one than the lengths give; 0: the
    longest context that was trained without YaRN."""

    def problems(self, where: str) -> list[str]:
        """Return one sentence for every rule that the stage breaks."""
        shares = sum(part.share for part in self.parts)
        names = [part.name for part in self.parts]
        rules = [
            (self.name.isprintable() and self.name.strip() and "/" not in self.name
             and not self.name.startswith("."),
             f"{where}.name = {self.name!r} must be usable as a folder's name"),
            (self.seq_len >= 2, f"{where}.seq_len = {self.seq_len} must be at least 2"),
            (min(self.steps, self.tokens, self.max_steps, self.global_batch_size) >= 0,
             f"{where}: steps {self.steps}, tokens {self.tokens}, max_steps {self.max_steps} and "
             f"global_batch_size {self.global_batch_size} must not be negative"),
            (not self.max_steps or self.max_steps >= self.steps,
             f"{where}.max_steps = {self.max_steps} must be at least steps = {self.steps}"),
            (all(part.share > 0 for part in self.parts) and shares <= 1,
             f"{where}.parts have shares {[part.share for part in self.parts]}; "
             "each must be positive and their sum at most 1"),
            (len(set(names)) == len(names), f"{where}.parts = {names} names a part twice"),
            (set(names) <= set(PARTS[self.kind]),
             f"{where}.parts = {names}: a stage of kind {self.kind} has parts {', '.join(PARTS[self.kind])}"),
            (self.kind != "midtraining" or "trajectories" in names,
             f"{where}.kind = midtraining needs a part named trajectories; use kind extension without one"),
            (min(self.lr, self.rope_theta) >= 0,
             f"{where}: lr {self.lr} and rope_theta {self.rope_theta} must not be negative"),
            (self.yarn_factor == 0 or self.yarn_factor >= 1,
             f"{where}.yarn_factor = {self.yarn_factor} must be 0 or at least 1"),
            (self.yarn_original_tokens >= 0,
             f"{where}.yarn_original_tokens = {self.yarn_original_tokens} must not be negative"),
        ]
        return [sentence for holds, sentence in rules if not holds] + above(
            where, self, seq_len=MAX_SEQ_LEN, steps=MAX_STEPS, tokens=MAX_TOKENS, max_steps=MAX_STEPS,
            global_batch_size=MAX_BATCH_SIZE)


@dataclass(frozen=True)
class GateConfig:
    """What ends a stage of `extend`: needle retrieval, with the short context as good as it was."""

    __pydantic_config__ = STRICT
    every_steps: int = 0
    """Optimizer steps between two checks; 0: no gate, a stage ends with its steps."""
    min_accuracy: float = 0.9
    """Every row of cells (kind, language, length) must reach it, over all depths together, and no single cell
    may lie below it with its whole confidence interval; 0: needles are counted and do not judge."""
    loss_tolerance_nats: float = 0.05
    """How much the held-out loss at the length before the first stage may rise above what it was there,
    in nats per token."""
    scan_tokens: int = 20_000_000
    """Training tokens of each source that are searched at most for what the gate asks and
    where it hides it."""
    max_overlap: float = 0.05
    """Part of the held-out text that may be found in the training text before the gate is refused."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that the gate breaks."""
        rules = [
            (self.every_steps >= 0, f"extend.gate.every_steps = {self.every_steps} must not be negative"),
            (0 <= self.min_accuracy <= 1,
             f"extend.gate.min_accuracy = {self.min_accuracy} must lie in [0, 1]"),
            (self.loss_tolerance_nats >= 0,
             f"extend.gate.loss_tolerance_nats = {self.loss_tolerance_nats} must not be negative"),
            (self.scan_tokens > 0, f"extend.gate.scan_tokens = {self.scan_tokens} must be positive"),
            (0 <= self.max_overlap <= 1, f"extend.gate.max_overlap = {self.max_overlap} must lie in [0, 1]"),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True)
class ExtendConfig:
    """Stages of `extend` and their gate."""

    __pydantic_config__ = STRICT
    stages: tuple[ExtendStageConfig, ...] = ()
    """Stages in order; empty: one stage as `data.phases` and `train` say."""
    gate: GateConfig = GateConfig()
    """What ends each stage."""

    def problems(self) -> list[str]:
        """Return one sentence for every broken rule."""
        p = [sentence for i, stage in enumerate(self.stages)
             for sentence in stage.problems(f"extend.stages.{i} ({stage.name})")]
        lengths = [stage.seq_len for stage in self.stages]
        if lengths != sorted(lengths):
            p.append(f"extend.stages have lengths {lengths}; a later stage is not shorter than "
                     "an earlier one")
        return p + self.gate.problems()
