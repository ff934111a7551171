"""CUDA graphs of routers: what a layer with experts launches between attention and the exchange of its tokens
(norm, router, shared experts; with `moe_preprocess` also their permutation) is launched as one.

A graph replays kernels on the memory of its capture, and runs no Python.  So what changes lies in fixed
places: a row's states and its padding are inputs of the graph, copied in at each replay; counts, balancing
losses and selection biases are buffers; the number of sequences of a batch is a tensor (`RoutingStep`); the
length of rows and sequences, and under a pipeline the number of micro-batches, are those of the capture, and
where they change graphs are captured anew.  Attention stays outside, and with it everything that depends on
where documents end.  Tests replay on the CPU what a capture recorded; on a GPU one was tried, and failed
(docs/gpu.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.tensor_parallel import random
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper, is_graph_capturing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import local_device


class RouterGraphs:
    """The graphs of a model that is trained; every method is called by all processes together."""

    def __init__(self, model: Any, wrapped: list[Any], optimizer: Any) -> None:
        """Note what they are captured of.

        Args:
            model: a `LanguageModel`, whose configuration says which parts graphs hold, if any.
            wrapped: its chunks in the library's data-parallel wrapper.
            optimizer: the library's, whose gradients a capture leaves behind.
        """
        self._model, self._wrapped, self._optimizer = model, wrapped, optimizer
        self._helper: Any = None
        self._captured: tuple[int, ...] = ()

    def prepare(self, row_tokens: int, seq_len: int, num_micro_batches: int, *, whole: bool) -> None:
        """See to it that the passes that come next replay graphs of their own sizes; gradients are zero
        behind it.

        Args:
            row_tokens: tokens of each micro-batch.
            seq_len: of each of its sequences.
            num_micro_batches: of this process.
            whole: whether it is a whole step; a part of one is computed without graphs where they are others.
        """
        config = self._model.config
        if config.cuda_graph_impl == "none":
            return
        # without a pipeline each micro-batch is through before the next one begins, and one graph serves all
        in_flight = num_micro_batches if parallel_state.get_pipeline_model_parallel_world_size() > 1 else 1
        sizes = row_tokens, seq_len, in_flight
        if whole and sizes != self._captured:
            self._capture(row_tokens, num_micro_batches)
            self._captured = sizes
        config.routing_step.has_graphs = sizes == self._captured

    def _capture(self, row_tokens: int, num_micro_batches: int) -> None:
        model, step = self._model, self._model.config.routing_step
        if self._helper is not None:
            self._helper.delete_cuda_graphs()
        model.finish_param_gather()
        # no hooks of the layer may be there; its graphs call them in front of each replay
        hooked = [chunk for chunk in self._wrapped if chunk.use_forward_hook]
        for chunk in hooked:
            chunk.disable_forward_pre_hook(param_sync=False)
        step.shared = None  # the last row's
        # the backward pass reads it where it lies, and the first pass of a run has not made it yet
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=local_device()))
        # the library asks its own calculator for their number
        reconfigure_num_microbatches_calculator(0, None, num_micro_batches, 1, 1)
        self._helper = TECudaGraphHelper(self._wrapped, model.config, row_tokens, 1, [self._optimizer])
        with _without_random_states():
            self._helper.create_cudagraphs()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        if hooked:
            self._helper.cuda_graph_set_manual_hooks()
        # captures count tokens of their own
        for router in (m for m in model.modules() if hasattr(m, "local_tokens_per_expert")):
            router.local_tokens_per_expert.zero_()
        step.forget_losses()


@contextlib.contextmanager
def off_the_default_stream(config: Any) -> Iterator[None]:
    """Have the library's data parallelism, which is made within, gather gradients on a stream of its own,
    where graphs are wanted; a context of no effect where they are not.

    It keeps autograd's nodes of the weights, and a node waits, wherever the backward pass runs, on the stream
    on which it was made.  In a capture that draws the stream into the graph, and the default one cannot be:
    CUDA says no more than that the capture is invalid.  The library's own loop does likewise.
    """
    if config.cuda_graph_impl == "none":
        yield
        return
    # torch tells of it as of an oversight, from 2.10 on
    warns = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warns is not None:
        warns(False)
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        yield
    here.wait_stream(beside)


@contextlib.contextmanager
def _without_random_states() -> Iterator[None]:
    """Have modules be computed again without the states of random numbers, which a capture can neither read
    nor set: nothing that graphs hold draws any."""
    both = random._get_all_rng_states, random._set_all_rng_states
    random._get_all_rng_states, random._set_all_rng_states = lambda: (), lambda *states: None
    try:
        yield
    finally:
        random._get_all_rng_states, random._set_all_rng_states = both


def graphed(layer: Any) -> Any:
    """Return the class of a layer with experts whose graphs get its row's padding, which the library drops.

    Args:
        layer: class of the library's layer, or one made of it.
    """
    class GraphedLayer(layer):
        _padding: torch.Tensor | None = None

        def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
            """Return the memory that a graph reads: [tokens, rows, hidden] states and a mask [rows,
            tokens]."""
            config, place = self.config, local_device()
            tokens = seq_length // context.size()
            tokens //= config.tensor_model_parallel_size if config.sequence_parallel else 1
            states = torch.ones(tokens, micro_batch_size, config.hidden_size, dtype=config.params_dtype,
                                device=place, requires_grad=True)
            return {"hidden_states": states,
                    "padding_mask": torch.zeros(micro_batch_size, tokens, dtype=torch.bool, device=place)}

        def _should_call_te_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
            step = self.config.routing_step
            serves = is_graph_capturing() or (step.has_graphs and step.is_plain)
            return serves and bool(super()._should_call_te_cudagraph(*args, **kwargs))

        def _te_cuda_graph_capture(self, hidden_states: torch.Tensor,
                                   padding_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self._forward_mlp(hidden_states, padding_mask=padding_mask))

        def _te_cuda_graph_replay(self, *args: Any, padding_mask: torch.Tensor, **kwargs: Any) -> Any:
            self._padding = padding_mask
            return super()._te_cuda_graph_replay(*args, **kwargs)

        def _get_te_cuda_graph_replay_args(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            inputs, named = super()._get_te_cuda_graph_replay_args(*args, **kwargs)
            return inputs, {**named, "padding_mask": self._padding}

    return GraphedLayer
