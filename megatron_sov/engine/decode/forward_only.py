"""Pipeline passes at any layout: forward and backward for training, and forward only for evaluation, scoring
and sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_sov.engine.model.chunk import ModelInputs, offloaded_activations
from megatron_sov.engine.model.gpu_settings import disable_quantization
from megatron_sov.engine.model.language_model import LanguageModel, prepare_head_input
from megatron_sov.engine.model.logprobs import Head, build_head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.route_replay import replay_routes

Loss = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""(last stage's hidden states, micro-batch) -> (scalar to differentiate, result)."""
Outputs = Callable[[list[torch.Tensor], Head, Any], Any]
"""(hidden states per depth, head, micro-batch) -> anything; called on the last pipeline stage."""


class ForwardModel:
    """A `LanguageModel` in evaluation mode without quantization. Calls are collective."""

    def __init__(self, model: LanguageModel, head_chunk_tokens: int) -> None:
        self.model = model
        self.config = model.config
        self._depths = model.architecture.num_predictions
        self.head_chunk_tokens = head_chunk_tokens

    @torch.no_grad()
    def map(self, micro_batches: Sequence[HasInputs], outputs: Outputs) -> list[Any]:
        """Run forward; return `outputs` per micro-batch on the last stage, empty on other stages."""
        if not micro_batches:
            return []

        def compute_outputs(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Any]:
            depths = split_depths(hidden, self._depths)
            return (torch.zeros((), device=hidden.device),
                    outputs(depths, build_head(self.model, self.head_chunk_tokens), batch))

        self.model.finish_param_gather()
        was_training = self.model.training
        self.model.eval()
        try:
            # all rows have equal length: stages agree on message shapes before the first message
            row_tokens = len(micro_batches[0].inputs.tokens)
            with disable_quantization(self.config):
                return run_pipeline(self.model.chunks, micro_batches, compute_outputs, row_tokens,
                                    forward_only=True)
        finally:
            self.model.train(was_training)

    def logits(self, micro_batch: HasInputs, positions: torch.Tensor) -> torch.Tensor:
        """Return full logits at a micro-batch's positions, on every process.

        [positions, vocabulary] float32 (float64 under fp64)."""
        def outputs(hidden: list[torch.Tensor], head: Head, batch: HasInputs) -> torch.Tensor:
            return head.logits(context.gather_positions(prepare_head_input(hidden[0], self.config),
                                                        positions))

        row_logits = self.map([micro_batch], outputs)
        shape = (len(positions), self.model.vocab_size)
        dtype = torch.promote_types(self.config.params_dtype, torch.float32)
        local = row_logits[0] if row_logits else torch.zeros(shape, dtype=dtype)
        return collectives.broadcast_from_last_stage(local)


class DocumentBatch:
    """Micro-batch with `ModelInputs` only: documents in a row, padded so that the layout can split it."""

    def __init__(self, documents: Sequence[Sequence[int]], device: torch.device, min_tokens: int = 0) -> None:
        multiple = context.get_row_multiple()
        lengths = [len(d) for d in documents]
        num_padding = -(-max(sum(lengths), min_tokens, multiple) // multiple) * multiple - sum(lengths)
        spans = lengths + ([num_padding] if num_padding else [])
        flat = torch.tensor([t for d in documents for t in d] + [0] * num_padding, dtype=torch.int64)
        self.ends = torch.tensor(lengths).cumsum(0) - 1
        """[documents] int64 row index for each document's last token."""
        self.inputs = ModelInputs(
            tokens=flat.to(device), positions=torch.cat([torch.arange(n) for n in spans]).to(device),
            cu_seqlens=torch.tensor([0, *spans]).cumsum(0).to(torch.int32).to(device),
            max_document_tokens=max(spans), padding=(torch.arange(len(flat)) >= sum(lengths)).to(device),
            host_bounds=[0, *accumulate(spans)])


def run_pipeline(chunks: Sequence[Any], micro_batches: Sequence[HasInputs], loss: Loss, row_tokens: int, *,
                 forward_only: bool) -> list[Any]:
    """Run micro-batches through the pipeline stages by Megatron-Core's schedule
    (`get_forward_backward_func`).

    Args:
        chunks: the model's chunks; for gradients, their data-parallel wrappers.
        micro_batches: micro-batches of this data-parallel rank, equal on every pipeline stage.
        loss: called on the last stage. Scalars are summed over micro-batches and data-parallel processes,
            never averaged.
        row_tokens: tokens per micro-batch.
        forward_only: without gradients.

    Returns:
        The second value that `loss` returned for each micro-batch; empty before the last stage.
    """

    def forward(iterator: Iterator[tuple[HasInputs, int | None]], model: Any,
                return_schedule_plan: bool = False) -> tuple[Any, Callable[[torch.Tensor], Any]]:
        batch, first_route = next(iterator)
        run = model.build_schedule_plan if return_schedule_plan else model
        return run(batch.inputs, first_route), partial(_compute_loss, loss, batch)

    interleaved = len(chunks) > 1
    # an interleaved pipeline takes micro-batches in groups of its size: an evaluation fills up its last group
    # and drops the surplus results
    count = len(micro_batches)
    surplus: int = (-count % parallel_state.get_pipeline_model_parallel_world_size()
                    if interleaved and forward_only else 0)
    fed = [*micro_batches, *[micro_batches[-1]] * surplus]
    config = get_model_config(chunks[0])
    with (contextlib.nullcontext() if forward_only else offloaded_activations(config),
          replay_routes(config, [batch.inputs.routes for batch in fed]) as firsts):
        routed = list(zip(fed, firsts, strict=True))
        try:
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(routed) for _ in chunks] if interleaved else iter(routed),
                model=list(chunks) if interleaved else chunks[0], num_microbatches=len(fed),
                seq_length=row_tokens, micro_batch_size=1, decoder_seq_length=row_tokens,
                forward_only=forward_only)
        finally:
            # generation passes no mask to the routers, and must not use the last row's
            config.routing_step.padding = None
    return results[:count]


class HasInputs(Protocol):
    """A micro-batch: model inputs, and more fields as the objective needs."""

    @property
    def inputs(self) -> ModelInputs:
        """`ModelInputs` for the chunks."""


def _compute_loss(loss: Loss, batch: HasInputs,
                  hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    scalar, extra = loss(hidden, batch)
    return scalar, torch.ones((), dtype=torch.int, device=scalar.device), extra


def split_depths(hidden: torch.Tensor, num_predictions: int) -> list[torch.Tensor]:
    """Split hidden states [depths * tokens, 1, hidden] into one tensor per depth."""
    return list(hidden.chunk(1 + num_predictions, dim=0))
