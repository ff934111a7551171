"""A model that is only run forward: evaluation, scoring, sampling, at whatever layout it lives in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from megatron_sov.engine.mcore.model import pipeline
from megatron_sov.engine.mcore.model.gpu_settings import in_bf16
from megatron_sov.engine.mcore.model.language_model import LanguageModel, ModelInputs, states_for_head
from megatron_sov.engine.mcore.model.logprobs import Head, head_of
from megatron_sov.engine.mcore.model.pipeline import HasInputs
from megatron_sov.engine.mcore.parallel import collectives, context

Outputs = Callable[[list[torch.Tensor], Head, Any], Any]
"""(hidden states per depth, head, micro-batch) -> anything; called on the last pipeline stage."""


def split_depths(hidden: torch.Tensor, num_mtp_layers: int) -> list[torch.Tensor]:
    """Return the trunk's hidden states and those of each multi-token prediction depth."""
    return list(hidden.chunk(1 + num_mtp_layers, dim=0))


class ForwardModel:
    """A model in evaluation mode, with nothing quantised; every call is made by all processes together."""

    def __init__(self, model: LanguageModel, head_chunk_tokens: int) -> None:
        self.model = model
        self.config = model.config
        self._depths = model.config.mtp_num_layers or 0
        self.head_chunk_tokens = head_chunk_tokens

    @torch.no_grad()
    def map(self, micro_batches: Sequence[HasInputs], outputs: Outputs) -> list[Any]:
        """Run forward and return what `outputs` gave for each micro-batch (on the last
        stage; empty elsewhere, and where there is none on any process)."""
        if not micro_batches:
            return []

        def last_stage(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Any]:
            depths = split_depths(hidden, self._depths)
            return (torch.zeros((), device=hidden.device),
                    outputs(depths, head_of(self.model, self.head_chunk_tokens), batch))

        self.model.finish_param_gather()
        was_training = self.model.training
        self.model.eval()
        try:
            row_tokens = len(micro_batches[0].inputs.tokens)
            with in_bf16(self.config):
                return pipeline.run(self.model.chunks, micro_batches, last_stage, row_tokens,
                                    forward_only=True)
        finally:
            self.model.train(was_training)

    def logits(self, micro_batch: HasInputs, positions: torch.Tensor) -> torch.Tensor:
        """Return full logits at a few positions of a micro-batch, on every process.

        [positions, vocabulary] float32 (float64 under fp64).
        """
        def outputs(hidden: list[torch.Tensor], head: Head, batch: HasInputs) -> torch.Tensor:
            return head.logits(context.pick(states_for_head(hidden[0], self.config), positions))

        found = self.map([micro_batch], outputs)
        shape = (len(positions), self.model.vocab_size)
        dtype = torch.promote_types(self.config.params_dtype, torch.float32)
        return collectives.broadcast_from_last_stage(found[0] if found else torch.zeros(shape, dtype=dtype))


class Inputs:
    """The barest micro-batch: documents in one row, padded to a length that the layout can split."""

    def __init__(self, documents: Sequence[Sequence[int]], device: torch.device, min_tokens: int = 0) -> None:
        multiple = context.row_multiple()
        lengths = [len(d) for d in documents]
        gap = -(-max(sum(lengths), min_tokens, multiple) // multiple) * multiple - sum(lengths)
        spans = lengths + ([gap] if gap else [])
        flat = torch.tensor([t for d in documents for t in d] + [0] * gap, dtype=torch.int64)
        self.ends = torch.tensor(lengths).cumsum(0) - 1
        """[documents] int64: position of each document's last token."""
        self.inputs = ModelInputs(
            tokens=flat.to(device), positions=torch.cat([torch.arange(n) for n in spans]).to(device),
            cu_seqlens=torch.tensor([0, *spans]).cumsum(0).to(torch.int32).to(device),
            max_document_tokens=max(spans), padding=(torch.arange(len(flat)) >= sum(lengths)).to(device),
            host_bounds=[0, *accumulate(spans)])
