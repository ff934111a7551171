"""CUDA graphs of MoE layers: norm, router and shared experts become one launch, between attention and token
dispatch (with `moe_preprocess` also the permutation).

A graph replays kernels on the memory of its capture and runs no Python. All varying data therefore has fixed
memory: hidden states and padding mask are graph inputs, copied at each replay; token counts, balancing losses
and selection biases are buffers; the number of sequences is a tensor in `RoutingStep`. Row length, sequence
length and, with pipelines, the number of micro-batches are fixed by the capture; if they change, graphs are
captured again. Attention stays outside because it depends on document bounds. CPU tests replay a recorded
capture; the one trial on a GPU failed (docs/gpu.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.tensor_parallel import random
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import get_local_device


class RouterGraphs:
    """CUDA graphs for a model in training. Methods are collective."""

    def __init__(self, model: Any, wrapped: list[Any], optimizer: Any) -> None:
        """Store references; `prepare` captures.

        Args:
            model: a `LanguageModel`; its config names the captured parts.
            wrapped: its chunks in Megatron-Core's data-parallel wrapper.
            optimizer: Megatron-Core's optimizer, whose gradients the capture zeroes.
        """
        self._model, self._wrapped, self._optimizer = model, wrapped, optimizer
        self._helper: Any = None
        self._captured: tuple[int, ...] = ()  # (row tokens, sequence tokens, micro-batches in flight)

    def prepare(self, row_tokens: int, seq_len: int, num_micro_batches: int, *, whole: bool) -> None:
        """Capture graphs for these sizes unless they exist. A capture zeroes the gradients.

        Args:
            row_tokens: tokens per micro-batch.
            seq_len: tokens per sequence.
            num_micro_batches: micro-batches of this process.
            whole: True for a whole step. A partial step of other sizes runs without graphs.
        """
        config = self._model.config
        if config.cuda_graph_impl == "none":
            return
        # without a pipeline one micro-batch is in flight, and all use the same graph
        has_pipeline = parallel_state.get_pipeline_model_parallel_world_size() > 1
        in_flight = num_micro_batches if has_pipeline or config.overlap_moe_expert_parallel_comm else 1
        sizes = row_tokens, seq_len, in_flight
        if whole and sizes != self._captured:
            self._capture(row_tokens, num_micro_batches)
            self._captured = sizes
        config.routing_step.has_graphs = sizes == self._captured

    def _capture(self, row_tokens: int, num_micro_batches: int) -> None:
        model, step = self._model, self._model.config.routing_step
        step.shared = None  # left over from the previous row; with it the layers would hide their graphs
        step.has_graphs = True  # makes `cuda_graphs` of a layer return the list that the capture fills
        if self._helper is not None:
            self._helper.delete_cuda_graphs()
        model.finish_param_gather()
        # layers must have no hooks during the capture; Megatron-Core then calls them before each replay
        hooked_chunks = [chunk for chunk in self._wrapped if chunk.use_forward_hook]
        for chunk in hooked_chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
        # captured backward kernels read the scale from this tensor, which otherwise only a first pass creates
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=get_local_device()))
        # Megatron-Core reads the number of micro-batches from its own calculator
        reconfigure_num_microbatches_calculator(0, None, num_micro_batches, 1, 1)
        self._helper = _GraphHelper(self._wrapped, model.config, row_tokens, 1, [self._optimizer])
        with _disable_rng_states():
            self._helper.create_cudagraphs()
        for chunk in hooked_chunks:
            chunk.enable_forward_pre_hook()
        if hooked_chunks:
            self._helper.cuda_graph_set_manual_hooks()
        # undo what the capture added to token counts and losses
        for router in (m for m in model.modules() if hasattr(m, "local_tokens_per_expert")):
            router.local_tokens_per_expert.zero_()
        step.reset_losses()


class _GraphHelper(TECudaGraphHelper):
    """Megatron-Core's capture. With overlapped expert messages it captures only trunk layers, because
    `OverlappedPasses` runs a prediction layer in one piece, but a replay ends before the dispatch.

    Megatron-Core captures layer by layer in the order of the overlapped passes, without layers that have no
    graph. Graphs share memory, so no forward graph may run before a backward graph that was captured first.
    This holds because layers without experts come before all others: they only delay forward passes.
    """

    def _discover_layers(self) -> None:
        super()._discover_layers()
        if self.config.overlap_moe_expert_parallel_comm:
            for layers, is_mtp in zip(self.callables_per_chunk, self.callables_per_chunk_is_mtp, strict=True):
                layers[:] = [layer for layer, excluded in zip(layers, is_mtp, strict=True) if not excluded]
            self.num_layers_per_chunk = [len(layers) for layers in self.callables_per_chunk]
            self.flattened_callables = [layer for layers in self.callables_per_chunk for layer in layers]
            self.flattened_callables_is_mtp = [False] * len(self.flattened_callables)


@contextlib.contextmanager
def use_side_stream(config: Any) -> Iterator[None]:
    """Create Megatron-Core's data-parallel wrapper on a side stream, if CUDA graphs are enabled.

    The wrapper keeps autograd nodes of the weights, and a node synchronizes in every backward pass with the
    stream that created it. A capture would include that stream, and the default stream cannot be captured:
    CUDA reports only an invalid capture. Megatron-Core's training loop does the same."""
    if config.cuda_graph_impl == "none":
        yield
        return
    # since torch 2.10 the stream mismatch raises a warning
    set_warning = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if set_warning is not None:
        set_warning(False)
    current, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
    side_stream.wait_stream(current)
    with torch.cuda.stream(side_stream):
        yield
    current.wait_stream(side_stream)


@contextlib.contextmanager
def _disable_rng_states() -> Iterator[None]:
    """Disable RNG state handling in recomputation: a capture cannot read or set the states, and no captured
    module draws random numbers."""
    previous = random._get_all_rng_states, random._set_all_rng_states
    random._get_all_rng_states, random._set_all_rng_states = lambda: (), lambda *states: None
    try:
        yield
    finally:
        random._get_all_rng_states, random._set_all_rng_states = previous


def build_graphed_layer(layer: Any) -> Any:
    """Return an MoE layer subclass whose graphs receive the padding mask, which Megatron-Core drops.

    Args:
        layer: Megatron-Core's layer class, or a subclass.
    """
    class GraphedLayer(layer):
        _padding: torch.Tensor | None = None

        @property
        def cuda_graphs(self) -> list[Any]:
            """One graph per micro-batch in flight; empty if the current pass must run without graphs."""
            step = self.config.routing_step
            return self._graphs if step.has_graphs and step.is_plain else []

        @cuda_graphs.setter
        def cuda_graphs(self, graphs: list[Any]) -> None:
            self._graphs = graphs

        def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
            """Return the graph's input memory: hidden states [tokens, rows, hidden], mask [rows, tokens]."""
            config, device = self.config, get_local_device()
            tokens = seq_length // context.get_cp_size()
            tokens //= config.tensor_model_parallel_size if config.sequence_parallel else 1
            states = torch.ones(tokens, micro_batch_size, config.hidden_size, dtype=config.params_dtype,
                                device=device, requires_grad=True)
            return {"hidden_states": states,
                    "padding_mask": torch.zeros(micro_batch_size, tokens, dtype=torch.bool, device=device)}

        def _te_cuda_graph_capture(self, hidden_states: torch.Tensor,
                                   padding_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self._forward_mlp(hidden_states, padding_mask=padding_mask))

        def _te_cuda_graph_replay(self, *args: Any, padding_mask: torch.Tensor | None = None,
                                  **kwargs: Any) -> Any:
            # overlapped passes (schedule plans) give no mask; take the current row's
            self._padding = self.config.routing_step.padding if padding_mask is None else padding_mask
            outputs = super()._te_cuda_graph_replay(*args, **kwargs)
            # the graph already recomputes the norm: keep a schedule plan from doing it again
            self.pre_mlp_norm_checkpoint = SimpleNamespace(
                discard_output_and_register_recompute=lambda tensor: None)
            return outputs

        def _get_te_cuda_graph_replay_args(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            inputs, named = super()._get_te_cuda_graph_replay_args(*args, **kwargs)
            return inputs, {**named, "padding_mask": self._padding}

    return GraphedLayer
