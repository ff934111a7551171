"""A stage of training: every group of settings gathered in `RunConfig`, and the rules between them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sov.config import curriculum, quantization
from megatron_sov.config.bounds import MAX_STEPS
from megatron_sov.config.data import DataConfig
from megatron_sov.config.distillation import DistillationConfig
from megatron_sov.config.encoders import MediaConfig
from megatron_sov.config.evaluate import EvaluateConfig
from megatron_sov.config.extend import ExtendConfig
from megatron_sov.config.gpu import GpuConfig
from megatron_sov.config.guards import GuardConfig
from megatron_sov.config.layout import ParallelConfig
from megatron_sov.config.lora import LoraConfig
from megatron_sov.config.model import STRICT, ModelConfig
from megatron_sov.config.needle import NeedleConfig
from megatron_sov.config.obs import ObsConfig
from megatron_sov.config.optim import OptimConfig
from megatron_sov.config.policy import PolicyConfig
from megatron_sov.config.preference import PreferenceConfig
from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.config.train import TrainConfig
from megatron_sov.errors import UserError, list_problems
from megatron_sov.plugins.code import Code


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and the weights of its terms."""

    __pydantic_config__ = STRICT
    name: str = "lm"
    """lm: next-token cross-entropy (with multi-token prediction where the model has it); sft: cross-entropy
    on responses; preference: pairs or groups of responses, see `preference`; distill: a teacher's
    distribution, see `distillation`; policy: the model's own responses by their rewards, see `policy` and
    `rollout`; or an objective of your own, FILE.py:NAME (docs/own_code.md)."""
    text_coeff: float = 0.0
    """sft: weight of an auxiliary cross-entropy on plain text, normalised over its own tokens."""
    loss_per: Literal["token", "turn", "sample"] = "token"
    """sft: what counts the same in the loss of responses: every token; every turn of the assistant, by its
    mean; or every sample (conversation), by its mean."""
    audio_weight: float = 1.0
    """lm, sft: what the loss of a label in `model.audio_tokens` counts; that of text counts 1."""
    image_weight: float = 1.0
    """Likewise of `model.image_tokens`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an objective of your own: the arguments that it takes by name."""

    def problems(self, model: ModelConfig) -> list[str]:
        """Return one sentence for every rule that these settings break; `model` is what learns."""
        p = []
        if not 0 <= self.text_coeff < math.inf:
            p.append(f"objective.text_coeff = {self.text_coeff} must be a number that is not negative")
        if self.text_coeff and self.name != "sft":
            p.append(f"objective.text_coeff = {self.text_coeff} belongs to objective sft, not {self.name}")
        for name, block in (("audio_weight", "audio_tokens"), ("image_weight", "image_tokens")):
            weight = getattr(self, name)
            if weight != 1 and getattr(model, block) is None:
                p.append(f"objective.{name} = {weight} needs model.{block}; set the block, or leave it at 1")
            if not 0 <= weight < math.inf:
                p.append(f"objective.{name} = {weight} must be a number that is not negative")
            if weight != 1 and self.name not in ("lm", "sft"):
                p.append(f"objective.{name} = {weight} belongs to objectives lm and sft, not {self.name}")
        if self.loss_per != "token" and self.name != "sft":
            p.append(f"objective.loss_per = {self.loss_per} belongs to objective sft, not {self.name}")
        return p


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
    preference: PreferenceConfig = PreferenceConfig()
    """What objective `preference` makes of responses that were judged."""
    distillation: DistillationConfig = DistillationConfig()
    """What objective `distill` makes of what a teacher says of the data."""
    rollout: RolloutConfig = RolloutConfig()
    """Rounds of reinforcement learning."""
    policy: PolicyConfig = PolicyConfig()
    """What objective `policy` makes of the responses of these rounds."""
    needle: NeedleConfig = NeedleConfig()
    """The needle suite of `extend`."""
    extend: ExtendConfig = ExtendConfig()
    """Stages and gate of `extend`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation beside training."""
    obs: ObsConfig = ObsConfig()
    """Trackers, metrics and alerts."""
    gpu: GpuConfig = GpuConfig()
    """How GPUs are used."""
    guards: GuardConfig = GuardConfig()
    """What watches the run."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adaptation of a frozen model."""
    media: MediaConfig = MediaConfig()
    """Which weights of encoders of pictures and sounds are trained."""
    code: tuple[Code, ...] = ()
    """Code of your own, or of installed packages, that the settings above name; written by the command."""

    def problems(self, num_ranks: int = 1) -> list[str]:
        """Return one sentence for every rule that this config breaks on `num_ranks` processes;
        empty when it is sound."""
        p = self.model.problems()
        p += self.parallel.problems(self.model, num_ranks)
        p += self.data.problems() + self._phase_problems() + self.train.problems()
        p += self.objective.problems(self.model)
        p += self.preference.problems() + self.optim.problems() + self.extend.problems()
        p += self.rollout.problems() + self.policy.problems(self.rollout)
        p += self.distillation.problems(self.model.vocab_size)
        p += self.gpu.problems(self.model, self.parallel, self.train, self.optim)
        p += self.needle.problems() + self.guards.problems(self.train.deterministic)
        p += self.evaluate.problems(self.train.export_every_checkpoints) + self.obs.problems()
        p += quantization.problems(self.train, self.model, self.parallel, self.data.phases)
        p += self.lora.problems(self.model, self.parallel, self.train, self.optim, self.gpu)
        p += self._media_problems()
        return p + ([] if p else self._batch_problems(num_ranks) + self._length_problems())

    def _media_problems(self) -> list[str]:
        """Check what is said of encoders against those that the model has."""
        p = [f"media.{name}_from = {folder!r}: the model has no model.{name}"
             for name, folder in (("vision", self.media.vision_from), ("audio", self.media.audio_from))
             if folder and getattr(self.model, name) is None]
        if self.lora.on and self.media.train_encoders:
            p.append("media.train_encoders = True: lora.rank freezes all weights but those of its own "
                     "adapters; set one of them off")
        return p

    def _phase_problems(self) -> list[str]:
        """Check every phase against what it is trained with: positions of the model,
        rows of the layout, a budget."""
        p = []
        if not (self.train.steps or self.train.tokens or all(phase.tokens for phase in self.data.phases)):
            p.append("train.steps = 0 needs a token budget; set train.steps, "
                     "train.tokens or every phase's tokens")
        for i, phase in enumerate(self.data.phases):
            where = f"data.phases.{i} ({phase.name})"
            if phase.seq_len > 1 and min(self.parallel.row_multiple, self.train.micro_batch_size) > 0:
                p += self._row_problems(where, phase.seq_len)
            if phase.seq_len > self.model.max_position_tokens:
                p.append(f"{where}.seq_len = {phase.seq_len} exceeds "
                         f"model.max_position_tokens = {self.model.max_position_tokens}")
        return p

    def _row_problems(self, where: str, seq_len: int) -> list[str]:
        """Check that a row, which is a micro-batch of whole samples, can be cut over the
        processes that share it."""
        samples, multiple, tp, cp = (self.train.micro_batch_size, self.parallel.row_multiple,
                                     self.parallel.tp, self.parallel.cp)
        if seq_len * samples % multiple == 0:
            return []
        why = f"2 x parallel.cp {cp} x parallel.tp {tp} = {multiple}" if cp > 1 else f"parallel.tp = {tp}"
        return [f"{where}.seq_len = {seq_len} x train.micro_batch_size {samples} = {seq_len * samples}, "
                f"the tokens of a row, must be a multiple of {why}"]

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
        return [f"global_batch_size = {size} (phase {phase.name}) must be a multiple of "
                f"train.micro_batch_size {t.micro_batch_size} x data parallel size {dp}{pipeline} = {unit}"
                for size, phase in sorted(sizes.items(), key=lambda item: item[0]) if size % unit]

    def _length_problems(self) -> list[str]:
        """Check the steps that follow from the token budgets."""
        steps = self.num_steps()
        return [] if steps <= MAX_STEPS else [
            f"the token budgets make {steps:,} steps, which must be at most {MAX_STEPS:,}; "
            "ask for fewer tokens, or larger batches"]

    def check(self, num_ranks: int = 1) -> None:
        """Raise `UserError` listing every problem, if there is any."""
        problems = self.problems(num_ranks)
        if problems:
            raise UserError(list_problems(f"recipe {self.recipe}", problems))

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
