"""A stage of training: data, optimizer, loop, objective, needle suite and trackers, gathered in `RunConfig`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sov.config import curriculum
from megatron_sov.config.data import DataConfig, PhaseConfig
from megatron_sov.config.evaluate import EvaluateConfig
from megatron_sov.config.extend import ExtendConfig
from megatron_sov.config.guards import GuardConfig
from megatron_sov.config.layout import ParallelConfig
from megatron_sov.config.model import STRICT, ModelConfig
from megatron_sov.config.needle import NeedleConfig
from megatron_sov.config.optim import OptimConfig
from megatron_sov.errors import UserError
from megatron_sov.plugins.code import Code


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how large, how often."""

    __pydantic_config__ = STRICT
    steps: int = 0
    """Optimizer steps; 0: as many as the token budgets need."""
    tokens: int = 0
    """Token budget of the run, for phases without one of their own; used when `steps` is 0."""
    global_batch_size: int = 512
    """Samples of one optimizer step, over all processes."""
    ramp_from_batch_size: int = 0
    """Samples of the first step when the batch size ramps up to `global_batch_size`; 0: no ramp."""
    ramp_increment: int = 0
    """Samples by which the batch size grows at a time."""
    ramp_steps: int = 0
    """Steps over which it grows, in equal stretches."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one process."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    """Dtype of weights and activations; bf16 keeps fp32 master weights and reduces gradients in fp32; fp64 is slow, for
    proofs that layouts agree."""
    deterministic: bool = False
    """The same bits in every run with the same settings on the same machines: slower algorithms where fast ones do not repeat."""
    hidden_dropout: float = 0.0
    """Share of values dropped behind the embedding, attention and feed-forward layers; a function of seed, step and layout."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass instead of storing them."""
    head_chunk_tokens: int = 2048
    """Tokens whose logits exist at a time; the output head runs in chunks of this many."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    export_every_checkpoints: int = 0
    """Every so many checkpoints, and the last one, become Hugging Face folders in RUN/exports beside training; 0: none."""
    keep_every_steps: int = 0
    """Checkpoints whose step is a multiple of this stay for ever, besides the newest; 0: none."""
    async_save: bool = True
    """Write checkpoints in the background while training goes on; needs host memory for what each process writes."""
    save_timeout_s: float = 1800.0
    """Seconds after which a checkpoint that is still not on disk (a file system that hangs) ends the run."""
    eval_every_steps: int = 500
    """Steps between evaluations on held-out documents; 0: only at the end."""
    log_every_steps: int = 1
    """Steps between `step` events."""
    max_restarts: int = 3
    """How often the local launcher starts the processes again after a fault, from the last checkpoint, without a new
    checkpoint in between; under torchrun or Slurm they restart the ranks."""
    num_threads: int = 0
    """CPU threads of each process; 0: cores divided by local processes."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and the weights of its terms."""

    __pydantic_config__ = STRICT
    name: str = "lm"
    """lm: next-token cross-entropy (with multi-token prediction where the model has it); sft: cross-entropy on responses;
    or an objective of your own, FILE.py:NAME (docs/own_code.md)."""
    text_coeff: float = 0.0
    """sft: weight of an auxiliary cross-entropy on plain text, normalised over its own tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an objective of your own: the arguments that it takes by name."""


@dataclass(frozen=True)
class ObsConfig:
    """Where a run is watched, besides events.jsonl and the progress bar."""

    __pydantic_config__ = STRICT
    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard (extra `dev`)."""
    wandb: bool = False
    """Log to Weights & Biases; works offline with WANDB_MODE=offline (extra `dev`)."""
    wandb_project: str = "megatron-sov"
    """Weights & Biases project."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one stage of training; saved resolved as RUN/config.json."""

    __pydantic_config__ = STRICT
    recipe: str
    """Name of the recipe that it came from."""
    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    data: DataConfig = DataConfig()
    """Sources, curriculum, packing."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned."""
    needle: NeedleConfig = NeedleConfig()
    """The needle suite of `extend`."""
    extend: ExtendConfig = ExtendConfig()
    """Stages and gate of `extend`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation beside training."""
    obs: ObsConfig = ObsConfig()
    """Trackers."""
    guards: GuardConfig = GuardConfig()
    """What watches the run."""
    code: tuple[Code, ...] = ()
    """Code of your own, or of installed packages, that the settings above name; written by the command."""

    def problems(self, num_ranks: int = 1) -> list[str]:
        """Return one sentence for every rule that this config breaks on `num_ranks` processes; empty when it is sound."""
        p = self.model.problems()
        p += self.parallel.problems(self.model, num_ranks)
        p += self._phase_problems() + self._number_problems() + self.optim.problems() + self.extend.problems()
        p += self.needle.problems() + self.guards.problems(self.train.deterministic)
        p += self.evaluate.background.problems(self.train.export_every_checkpoints)
        return p + ([] if p else self._batch_problems(num_ranks))

    def _phase_problems(self) -> list[str]:
        p = []
        if not self.data.phases:
            p.append("data.phases = () must hold at least one phase")
        if len({bool(phase.tokens) for phase in self.data.phases}) > 1:
            p.append("data.phases: some phases have a budget in tokens and some have none; give one to all or to none")
        for first, last in self.data.skip_steps:
            if not 0 < first <= last:
                p.append(f"data.skip_steps has [{first}, {last}]; a stretch is [first, last] with 1 <= first <= last")
        for i, phase in enumerate(self.data.phases):
            where = f"data.phases.{i} ({phase.name})"
            for name in ("tokens", "global_batch_size"):
                if getattr(phase, name) < 0:
                    p.append(f"{where}.{name} = {getattr(phase, name)} must not be negative")
            p += _rate_problems(where, phase)
            if phase.share <= 0:
                p.append(f"{where}.share = {phase.share} must be positive")
            if phase.seq_len < 2:
                p.append(f"{where}.seq_len = {phase.seq_len} must be at least 2")
            elif min(self.parallel.row_multiple, self.train.micro_batch_size) > 0:
                p += self._row_problems(where, phase.seq_len)
            if phase.seq_len > self.model.max_position_tokens:
                p.append(f"{where}.seq_len = {phase.seq_len} exceeds "
                         f"model.max_position_tokens = {self.model.max_position_tokens}")
            for source, weight in phase.blend.items():
                if weight < 0:
                    p.append(f"{where}.blend.{source} = {weight} must not be negative")
            if phase.blend and not sum(phase.blend.values()) > 0:
                p.append(f"{where}.blend has only zero weights; give at least one source a weight")
        return p

    def _row_problems(self, where: str, seq_len: int) -> list[str]:
        """Check that a row, which is a micro-batch of whole samples, can be cut over the processes that share it."""
        samples, multiple, tp, cp = self.train.micro_batch_size, self.parallel.row_multiple, self.parallel.tp, self.parallel.cp
        if seq_len * samples % multiple == 0:
            return []
        why = f"2 x parallel.cp {cp} x parallel.tp {tp} = {multiple}" if cp > 1 else f"parallel.tp = {tp}"
        return [f"{where}.seq_len = {seq_len} x train.micro_batch_size {samples} = {seq_len * samples}, the tokens of a row, "
                f"must be a multiple of {why}"]

    def _number_problems(self) -> list[str]:
        p = []
        t = self.train
        rules = [
            (t.steps >= 0, f"train.steps = {t.steps} must not be negative"),
            (t.steps > 0 or t.tokens > 0 or all(phase.tokens for phase in self.data.phases),
             "train.steps = 0 needs a token budget; set train.steps, train.tokens or every phase's tokens"),
            (t.tokens >= 0, f"train.tokens = {t.tokens} must not be negative"),
            (0 <= t.ramp_from_batch_size <= max(0, t.global_batch_size),
             f"train.ramp_from_batch_size = {t.ramp_from_batch_size} must lie between 0 and "
             f"train.global_batch_size = {t.global_batch_size}"),
            (not t.ramp_from_batch_size or (t.ramp_increment > 0 and t.ramp_steps > 0),
             f"train.ramp_from_batch_size = {t.ramp_from_batch_size} needs train.ramp_increment and train.ramp_steps above 0"),
            (self.data.prefetch_steps >= 0, f"data.prefetch_steps = {self.data.prefetch_steps} must not be negative"),
            (self.data.max_epochs >= 0, f"data.max_epochs = {self.data.max_epochs} must not be negative"),
            (t.global_batch_size > 0, f"train.global_batch_size = {t.global_batch_size} must be positive"),
            (t.micro_batch_size > 0, f"train.micro_batch_size = {t.micro_batch_size} must be positive"),
            (t.head_chunk_tokens > 0, f"train.head_chunk_tokens = {t.head_chunk_tokens} must be positive"),
            (t.checkpoint_every_steps > 0, f"train.checkpoint_every_steps = {t.checkpoint_every_steps} must be positive"),
            (t.log_every_steps > 0, f"train.log_every_steps = {t.log_every_steps} must be positive"),
            (t.export_every_checkpoints >= 0,
             f"train.export_every_checkpoints = {t.export_every_checkpoints} must not be negative"),
            (t.keep_checkpoints >= 0, f"train.keep_checkpoints = {t.keep_checkpoints} must not be negative"),
            (t.keep_every_steps >= 0 and t.keep_every_steps % max(1, t.checkpoint_every_steps) == 0,
             f"train.keep_every_steps = {t.keep_every_steps} must be a multiple of "
             f"train.checkpoint_every_steps = {t.checkpoint_every_steps}, or 0"),
            (0 < t.save_timeout_s < math.inf, f"train.save_timeout_s = {t.save_timeout_s} must be a positive number"),
            (0 <= t.hidden_dropout < 1, f"train.hidden_dropout = {t.hidden_dropout} must lie in [0, 1)"),
            (t.eval_every_steps >= 0, f"train.eval_every_steps = {t.eval_every_steps} must not be negative"),
            (t.max_restarts >= 0, f"train.max_restarts = {t.max_restarts} must not be negative"),
            (t.num_threads >= 0, f"train.num_threads = {t.num_threads} must not be negative"),
            (self.data.heldout_tokens >= 0, f"data.heldout_tokens = {self.data.heldout_tokens} must not be negative"),
            (0 <= self.objective.text_coeff < math.inf,
             f"objective.text_coeff = {self.objective.text_coeff} must be a number that is not negative"),
            (self.objective.name == "sft" or not self.objective.text_coeff,
             f"objective.text_coeff = {self.objective.text_coeff} belongs to objective sft, not {self.objective.name}"),
        ]
        p += [sentence for holds, sentence in rules if not holds]
        return p

    def _batch_problems(self, num_ranks: int) -> list[str]:
        """Check every batch size that the run will use."""
        t = self.train
        dp = num_ranks // self.parallel.ranks_per_replica
        unit = t.micro_batch_size * dp
        sizes = {curriculum.batch_size_at(t, phase, step): phase for phase in reversed(self.data.phases)
                 for step in [t.ramp_steps, 0, *curriculum.ramp_changes(t, phase)]}
        interleaved = self.parallel.vpp > 1
        unit *= self.parallel.pp if interleaved else 1
        pipeline = f" x parallel.pp {self.parallel.pp}, since parallel.vpp > 1" if interleaved else ""
        return [f"global_batch_size = {size} (phase {phase.name}) must be a multiple of train.micro_batch_size "
                f"{t.micro_batch_size} x data parallel size {dp}{pipeline} = {unit}"
                for size, phase in sorted(sizes.items(), key=lambda item: item[0]) if size % unit]

    def check(self, num_ranks: int = 1) -> None:
        """Raise `UserError` listing every problem, if there is any."""
        problems = self.problems(num_ranks)
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise UserError(f"recipe {self.recipe}: {count}\n" + "\n".join(f"  {p}" for p in problems))

    def num_steps(self) -> int:
        """Return the run's optimizer steps."""
        return sum(curriculum.phase_steps(self.data, self.train))

    def phase_starts(self) -> list[int]:
        """Return the first step (0-based) of each phase."""
        steps = curriculum.phase_steps(self.data, self.train)
        return [sum(steps[:i]) for i in range(len(steps))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` gives back an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _rate_problems(where: str, phase: PhaseConfig) -> list[str]:
    """Check a phase's own learning rate."""
    p = []
    if phase.rewarm_steps < 0:
        p.append(f"{where}.rewarm_steps = {phase.rewarm_steps} must not be negative")
    if not 0 <= phase.min_lr <= phase.lr < math.inf:
        p.append(f"{where}.min_lr = {phase.min_lr} must lie between 0 and the phase's lr = {phase.lr}")
    if phase.schedule and not phase.lr:
        p.append(f"{where}.schedule = {phase.schedule} needs a rate of the phase's own; set its lr")
    return p
