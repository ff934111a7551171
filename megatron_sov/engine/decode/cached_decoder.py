"""A model that reads sequences span by span, at any layout, with what it has read kept in a cache.

A row of spans passes through the pipeline stages one after the other, each stage's runs of layers in turn, so
interleaved pipelines work as plain ones do.  Processes of a context-parallel group do not share rows here:
like data-parallel ones they read sequences of their own, since a token that is read after the others
leaves nothing to cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan, ReadRow, read_row
from megatron_sov.engine.model.gpu_settings import in_bf16
from megatron_sov.engine.model.kv_cache import CachedAttention, keep
from megatron_sov.engine.model.language_model import gather_sequence, states_for_head
from megatron_sov.engine.model.linear_attention import KeptState
from megatron_sov.engine.model.logprobs import Head, head_of
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import local_device


def share_place() -> tuple[int, int]:
    """Return this process's rank among the processes that read sequences of their own, and their number."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group.rank(), group.size()


def over_shares(values: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Return the sum (or another operation) over the processes that read sequences of their own,
    on every one of them."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return values
    total = collectives.to_comm_device(values.clone())
    dist.all_reduce(total, operation, group)
    return total.cpu()


@dataclass(frozen=True)
class DecodeOutput:
    """A row that has been read."""

    row: ReadRow
    """Its spans."""
    hidden: torch.Tensor | None
    """[tokens / sequence-parallel size, 1, hidden] on the last pipeline stage, None elsewhere."""
    routes: torch.Tensor | None = None
    """[tokens, layers with experts, top_k] on the CPU: experts that tokens visited, on every process of the
    replica's tp x pp part; None: nobody asked."""


class CachedDecoder:
    """A policy with a cache for its sequences; a context manager, within which the model does nothing else.

    Every call is made by all processes of a replica together; `read` by all processes,
    wherever experts are shared.
    """

    def __init__(self, policy: ForwardModel, size: CacheSize, *, with_routes: bool = False) -> None:
        """Take a policy.

        Args:
            policy: the model.
            size: of its caches.
            with_routes: whether every row's routes are told; the model has experts then.
        """
        self._policy, self._model, self._size = policy, policy.model, size
        self._with_routes = with_routes
        self._layers: list[CachedAttention | KeptState] = []
        self._exit = contextlib.ExitStack()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        """Whether this process sees the outputs."""
        self.predicts_together = policy.model.architecture.mtp_experts
        """Whether `predict` and `pick` are calls of all processes of the last stage, as `read` is: the
        prediction layer's experts may be on any of them."""

    def __enter__(self) -> CachedDecoder:
        """Put the model into evaluation mode, with empty caches."""
        self._model.finish_param_gather()
        self._exit.callback(self._model.train, self._model.training)
        self._model.eval()
        self._exit.enter_context(torch.no_grad())
        self._exit.enter_context(in_bf16(self._model.config))
        self._layers = self._exit.enter_context(keep(self._model, self._size))
        return self

    def __exit__(self, *error: Any) -> None:
        self._layers = []
        self._model.config.routing_step.record = None
        self._exit.close()

    def any_has(self, count: int) -> bool:
        """Return whether a process that reads other sequences has any of what this one counts; called by all
        of a stage."""
        return bool(over_shares(torch.tensor([count]), dist.ReduceOp.MAX)[0])

    def common_row_tokens(self, num_tokens: int) -> int:
        """Agree with the processes that read other sequences on the next row; returns its length here, 0
        where all are done.

        Called by all processes, with the number of tokens that each of them has to read (0: nothing).
        """
        longest = int(over_shares(torch.tensor([num_tokens]), dist.ReduceOp.MAX)[0])
        if not longest:
            return 0
        # one of the library's ways to reach experts gathers rows, which must then be equally long
        wanted = longest if self._model.config.moe_token_dispatcher_type == "allgather" else num_tokens
        multiple = context.row_multiple()
        return -(-max(wanted, 1) // multiple) * multiple

    def read(self, spans: Sequence[CacheSpan], row_tokens: int) -> DecodeOutput:
        """Read new tokens, in a row of the length that `common_row_tokens` gave."""
        row = read_row(spans, row_tokens, local_device())
        config, hidden = self._model.config, None
        first, stages = (parallel_state.get_pipeline_model_parallel_rank() == 0,
                         config.pipeline_model_parallel_size)
        shape = (row_tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1), 1,
                 config.hidden_size)
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        record: dict[int, list[torch.Tensor]] = {}
        config.routing_step.record = record if self._with_routes else None
        for number, chunk in enumerate(self._model.chunks):
            if stages > 1 and not (first and number == 0):
                hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=local_device())
                dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            chunk.set_input_tensor(hidden)
            hidden = chunk.read(row)
            if stages > 1 and not (self.last_stage and number == len(self._model.chunks) - 1):
                dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
        config.routing_step.record = None
        return DecodeOutput(row, hidden if self.last_stage else None,
                            self._gathered(record, row_tokens) if self._with_routes else None)

    def predict(self, read: DecodeOutput, ahead: torch.Tensor) -> DecodeOutput:
        """Run the multi-token prediction layer over a row; called on the last stage.

        Args:
            read: states of the depth before.
            ahead: [row tokens] int64, the token that follows each; what stands behind an unknown one
                is read again later.
        """
        ahead = ahead.to(local_device())
        return DecodeOutput(read.row, self._model.chunks[-1].predict(read.row, read.hidden, ahead))

    def pick(self, read: DecodeOutput, places: Sequence[int], spans: Sequence[CacheSpan]) -> DecodeOutput:
        """Return some places' states as a row of their own, one token each (on the last stage)."""
        multiple = context.row_multiple()
        row_tokens = (self.common_row_tokens(len(places)) if self.predicts_together
                      else -(-len(places) // multiple) * multiple)
        row = read_row(spans, row_tokens, local_device())
        padded = [*places, *[0] * (len(row.tokens) - len(places))]
        states = self._states(read, padded, gather_sequence)[:, None]
        if self._model.config.sequence_parallel:
            states = states.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()]
        return DecodeOutput(row, states)

    def top_tokens(self, read: DecodeOutput, places: Sequence[int]) -> torch.Tensor:
        """Return the most probable next token [places] int64 behind row indices (on the last stage)."""
        return self._head().top_tokens(self._states(read, places)).cpu()

    def best_tokens(self, read: DecodeOutput, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return these tokens, and the log-probability [places] of each (on the last stage)."""
        tokens, logprobs = self._head().best_tokens(self._states(read, places))
        return tokens.cpu(), logprobs.cpu()

    def logits(self, read: DecodeOutput, places: Sequence[int]) -> torch.Tensor:
        """Return full logits [places, vocabulary] behind row indices (on the last stage)."""
        return self._head().logits(self._states(read, places))

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for layer in self._layers:
            layer.copy(source, targets)

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """Return the int64 tensor as one process of the last stage holds it, on all processes of the
        replica's tp x pp part."""
        group: Any = parallel_state.get_model_parallel_group()
        if group.size() == 1:
            return values
        source = group.size() - parallel_state.get_tensor_model_parallel_world_size()
        sent = collectives.to_comm_device(values.clone())
        dist.broadcast(sent, group=group, group_src=source)
        return sent.cpu()

    def _gathered(self, record: dict[int, list[torch.Tensor]], row_tokens: int) -> torch.Tensor:
        """Return the routes of a row, of which each process of a replica's tp x pp part has recorded its own
        layers', and under sequence parallelism its own tokens'."""
        config, group = self._model.config, parallel_state.get_model_parallel_group()
        first = 1 + config.moe_layer_freq.index(1)
        # what is summed over processes must be a type that all of them can sum
        dtype = torch.uint8 if config.num_moe_experts <= torch.iinfo(torch.uint8).max else torch.int32
        routes = torch.zeros(row_tokens, sum(config.moe_layer_freq), config.moe_router_topk, dtype=dtype,
                             device=local_device())
        part, rank = 0, parallel_state.get_tensor_model_parallel_rank()
        if config.sequence_parallel:
            part = rank * (row_tokens // config.tensor_model_parallel_size)
        elif rank:  # its tokens are those of the first
            record = {}
        for layer, (experts,) in record.items():
            routes[part:part + len(experts), layer - first] = experts.to(dtype)
        if group.size() > 1:
            dist.all_reduce(routes, group=group)
        return routes.cpu()

    def _head(self) -> Head:
        return head_of(self._model, self._policy.head_chunk_tokens)

    def _states(self, read: DecodeOutput, places: Sequence[int],
                gathering: Callable[[torch.Tensor, Any], torch.Tensor] = states_for_head) -> torch.Tensor:
        assert read.hidden is not None
        gathered = gathering(read.hidden, self._model.config)
        return gathered[torch.tensor(list(places), device=gathered.device)]
