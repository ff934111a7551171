"""A teacher beside the student that learns: a second model on the same processes, at the student's layout,
which reads each batch just before the student learns it.

The library's process groups are one per process, so a teacher at a layout of its own is another job
(`teacher`).  Nothing is kept on disk: whoever resumes has the same teacher read the same batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.divergence import Divergence, Teacher, TeacherStates, TeacherTopK
from megatron_sov.engine.model.language_model import ModelInputs
from megatron_sov.engine.model.logprobs import Head, head_of
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.infer.engines.load import load_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig
from megatron_sov.post.distillation.teacher import weights_digest, whole_states
from megatron_sov.runs.checkpoints import settings_of
from megatron_sov.train.objectives.microbatch import MicroBatch


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The barest micro-batch."""

    inputs: ModelInputs


class LiveTeacher:
    """A `distill.RunTeacher` that reads while the run goes on."""

    def __init__(self, checkpoint: Path, config: RunConfig, num_ranks: int) -> None:
        """Check that it can be learned from.

        Args:
            checkpoint: the teacher's.
            config: of the run.
            num_ranks: its processes.

        Raises:
            UserError: it knows other token ids, reads shorter rows, or does not fit the run's layout.
        """
        asked, theirs = config.distillation, settings_of(checkpoint)
        self.teacher = weights_digest(Target(checkpoint, False))
        self.divergence = Divergence(asked.beta, asked.temperature)
        self._path, self._asked = checkpoint, asked
        # what of a layout is about experts, or about layers one by one, is the student's own
        alone: dict[str, Any] = {} if theirs.model.num_experts else {"ep": 1, "etp": 1}
        if theirs.model.num_layers != config.model.num_layers:
            alone["pipeline_layout"] = ()
        self._config = dataclasses.replace(config, model=theirs.model, lora=theirs.lora,
                                           parallel=dataclasses.replace(config.parallel, **alone))
        if asked.other_tokenizer:
            raise UserError("distillation.other_tokenizer = True: a teacher of another tokenizer reads whole "
                            "documents; have `megatron-sov distill` learn from it, or choose one of the same")
        if theirs.model.vocab_size != config.model.vocab_size:
            raise UserError(f"--teacher {checkpoint}: has {theirs.model.vocab_size} token ids, the student "
                            f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many")
        if asked.top_k >= theirs.model.vocab_size:
            raise UserError(f"distillation.top_k = {asked.top_k}: must be below the "
                            f"{theirs.model.vocab_size} token ids; set it to less, or to 0")
        if config.data.max_seq_len() > theirs.model.max_position_tokens:
            raise UserError(f"--teacher {checkpoint}: reads {theirs.model.max_position_tokens} tokens, and a "
                            f"row has up to {config.data.max_seq_len()}; choose another one, or shorter rows")
        if problems := self._config.parallel.problems(self._config.model, num_ranks):
            raise SettingsError(f"--teacher {checkpoint}: runs at the layout of the student", problems)
        self._model: ForwardModel | None = None

    def verify(self, world: ParallelWorld) -> None:
        """Load it; called by all processes together.

        Raises:
            UserError: a file of it is damaged.
        """
        self._model = load_forward_model(self._path, self._config)

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Return micro-batches with what it says of them; called by all processes together."""
        model, top_k = self._model, self._asked.top_k
        assert model is not None, "is not loaded"

        def rows(hidden: list[torch.Tensor], head: Head, batch: _Reading) -> torch.Tensor:
            if not top_k:
                return whole_states(hidden[0], model)
            ids, logprobs = head.most_probable(hidden[0], top_k, self.divergence.temperature)
            return torch.cat([ids.to(logprobs.dtype), logprobs], 1)

        # routes that are replayed are the student's
        said = model.map([_Reading(dataclasses.replace(b.inputs, routes=None)) for b in batches], rows)
        # only the last stage compares
        return tuple(dataclasses.replace(batch, said=found)
                     for batch, found in zip(batches, said, strict=True)) if said else tuple(batches)

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """As `distill.RunTeacher.at`."""
        assert batch.said is not None and self._model is not None, "it has not read the micro-batch"
        said = context.local(batch.said)
        if top_k := self._asked.top_k:
            return TeacherTopK(said[:, :top_k].long(), said[:, top_k:], self._asked.keep_remainder)
        weight = head_of(self._model.model, self._model.head_chunk_tokens).weight
        return TeacherStates(said, weight, self._config.model.logits_softcap)

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """As `distill.RunTeacher.heard`: all of it."""
        return batch.weights
