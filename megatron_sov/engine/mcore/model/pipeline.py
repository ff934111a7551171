"""Forward and backward over the micro-batches of a step, by the library's pipeline schedules; where they
have routes, these are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_sov.engine.mcore.model.language_model import ModelInputs
from megatron_sov.engine.mcore.model.replay import replayed


class HasInputs(Protocol):
    """A micro-batch: whatever the objective needs, plus what the model reads."""

    @property
    def inputs(self) -> ModelInputs:
        """The model's inputs."""
        ...


Loss = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""(hidden states of the last stage, micro-batch) -> (scalar whose gradient is taken as it is,
anything to return)."""


def run(chunks: Sequence[Any], micro_batches: Sequence[HasInputs], loss: Loss, row_tokens: int, *,
        forward_only: bool) -> list[Any]:
    """Run all micro-batches through all pipeline stages.

    Args:
        chunks: the model's chunks, or their data-parallel wrappers when gradients are wanted.
        micro_batches: this data-parallel rank's micro-batches, the same on every pipeline stage.
        loss: called on the last stage only; scalars are summed over micro-batches and processes that read
            different data, never averaged.
        row_tokens: tokens of each micro-batch.
        forward_only: without gradients.

    Returns:
        What `loss` returned beside the scalar for each micro-batch (empty on other stages than the last).
    """

    def forward(iterator: Iterator[tuple[HasInputs, int | None]],
                model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch, first_route = next(iterator)
        return model(batch.inputs, first_route), partial(_finish, loss, batch)

    interleaved = len(chunks) > 1
    # an interleaved pipeline takes micro-batches in groups of its size; an evaluation's last group is
    # filled up and cut again
    count = len(micro_batches)
    surplus: int = (-count % parallel_state.get_pipeline_model_parallel_world_size()
                    if interleaved and forward_only else 0)
    fed = [*micro_batches, *[micro_batches[-1]] * surplus]
    with replayed(get_model_config(chunks[0]), [batch.inputs.routes for batch in fed]) as firsts:
        routed = list(zip(fed, firsts, strict=True))
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(routed) for _ in chunks] if interleaved else iter(routed),
            model=list(chunks) if interleaved else chunks[0], num_microbatches=len(fed),
            seq_length=row_tokens, micro_batch_size=1, decoder_seq_length=row_tokens,
            forward_only=forward_only)
    return results[:count]


def _finish(loss: Loss, batch: HasInputs, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    scalar, extra = loss(hidden, batch)
    return scalar, torch.ones((), dtype=torch.int, device=scalar.device), extra
