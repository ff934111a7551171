"""Generate with a KV cache, at any `ParallelConfig`.

A row (`SpanRow`) packs spans: a span is the new tokens of one sequence. It passes through the pipeline
stages, and through all chunks of an interleaved stage in turn. Processes of a context-parallel group read
different sequences, as data-parallel processes do: a single new token cannot be split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan, SpanRow, pack_spans
from megatron_sov.engine.model.gpu_settings import disable_quantization
from megatron_sov.engine.model.kv_cache import CachedAttention, use_kv_cache
from megatron_sov.engine.model.language_model import LanguageModel, prepare_head_input
from megatron_sov.engine.model.linear_attention import RecurrentCache
from megatron_sov.engine.model.logprobs import Head, build_head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import get_local_device


class CachedDecoder:
    """A `ForwardModel` with KV caches, and a context manager: inside, only the decoder may use the model.

    All calls are collective over the replica; `read` is collective over all processes that share experts."""

    def __init__(self, policy: ForwardModel, size: CacheSize, *, with_routes: bool = False) -> None:
        """Store references; `__enter__` creates the caches.

        Args:
            policy: the model.
            size: limits of its caches.
            with_routes: whether to record the routes of every row (MoE models only).
        """
        self._policy, self._model, self._size = policy, policy.model, size
        self._with_routes = with_routes
        self._layers: list[CachedAttention | RecurrentCache] = []
        self._exit = contextlib.ExitStack()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        """Whether this process computes outputs."""

    def __enter__(self) -> CachedDecoder:
        """Switch the model to evaluation mode, with empty caches."""
        self._model.finish_param_gather()
        self._exit.callback(self._model.train, self._model.training)
        self._model.eval()
        self._exit.enter_context(torch.no_grad())
        self._exit.enter_context(disable_quantization(self._model.config))
        self._exit.enter_context(use_plain_products(self._model))
        self._layers = self._exit.enter_context(use_kv_cache(self._model, self._size))
        return self

    def __exit__(self, *error: Any) -> None:
        self._layers = []
        self._model.config.routing_step.record = None
        self._exit.close()

    def agree_row_tokens(self, num_tokens: int) -> int:
        """Return the local length of the next row, agreed over all replicas; 0 if every replica has finished.
        Collective over all processes.

        Args:
            num_tokens: new tokens of this process; 0: none.
        """
        longest = int(all_reduce_replicas(torch.tensor([num_tokens]), dist.ReduceOp.MAX)[0])
        if not longest:
            return 0
        # the allgather dispatcher requires rows of equal length
        local_tokens = longest if self._model.config.moe_token_dispatcher_type == "allgather" else num_tokens
        multiple = context.get_row_multiple()
        return -(-max(local_tokens, 1) // multiple) * multiple

    def read(self, spans: Sequence[CacheSpan], row_tokens: int) -> DecodeOutput:
        """Run the trunk on new tokens, in a row of the length that `agree_row_tokens` returned."""
        row = pack_spans(spans, row_tokens, get_local_device())
        config, hidden = self._model.config, None
        is_first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
        num_stages = config.pipeline_model_parallel_size
        local_tokens = row_tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        shape = (local_tokens, 1, config.hidden_size)
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        record: dict[int, list[torch.Tensor]] = {}
        config.routing_step.record = record if self._with_routes else None
        for number, chunk in enumerate(self._model.chunks):
            if num_stages > 1 and not (is_first_stage and number == 0):
                hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=get_local_device())
                dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            chunk.set_input_tensor(hidden)
            hidden = chunk.forward_cached(row)
            if num_stages > 1 and not (self.last_stage and number == len(self._model.chunks) - 1):
                dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
        config.routing_step.record = None
        return DecodeOutput(row, hidden if self.last_stage else None,
                            self._combine_routes(record, row_tokens) if self._with_routes else None)

    def best_tokens(self, output: DecodeOutput, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return most probable next tokens [indices] int64 and log-probabilities, on the last stage."""
        tokens, logprobs = self._build_head().best_tokens(self._gather_states(output, indices))
        return tokens.cpu(), logprobs.cpu()

    def logits(self, output: DecodeOutput, indices: Sequence[int]) -> torch.Tensor:
        """Return full logits [indices, vocab_size] at row indices, on the last stage."""
        return self._build_head().logits(self._gather_states(output, indices))

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for layer in self._layers:
            layer.copy(source, targets)

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """Broadcast an int64 tensor from the last stage's first process to the replica's tp x pp group."""
        group: Any = parallel_state.get_model_parallel_group()
        if group.size() == 1:
            return values
        source = group.size() - parallel_state.get_tensor_model_parallel_world_size()
        shared = collectives.to_comm_device(values.clone())
        dist.broadcast(shared, group=group, group_src=source)
        return shared.cpu()

    def _combine_routes(self, record: dict[int, list[torch.Tensor]], row_tokens: int) -> torch.Tensor:
        """Combine a row's routes over the replica's tp x pp group: a process recorded only local layers, and
        under sequence parallelism only local tokens."""
        config, group = self._model.config, parallel_state.get_model_parallel_group()
        first_layer = 1 + config.moe_layer_freq.index(1)  # layers count from 1
        # a dtype that all backends can sum
        dtype = torch.uint8 if config.num_moe_experts <= torch.iinfo(torch.uint8).max else torch.int32
        routes = torch.zeros(row_tokens, sum(config.moe_layer_freq), config.moe_router_topk, dtype=dtype,
                             device=get_local_device())
        begin, rank = 0, parallel_state.get_tensor_model_parallel_rank()
        if config.sequence_parallel:
            begin = rank * (row_tokens // config.tensor_model_parallel_size)
        elif rank:  # rank 0 has the same tokens, and the sum must count them once
            record = {}
        for layer, (experts,) in record.items():
            routes[begin:begin + len(experts), layer - first_layer] = experts.to(dtype)
        if group.size() > 1:
            dist.all_reduce(routes, group=group)
        return routes.cpu()

    def _build_head(self) -> Head:
        return build_head(self._model, self._policy.head_chunk_tokens)

    def _gather_states(self, output: DecodeOutput, indices: Sequence[int]) -> torch.Tensor:
        assert output.hidden is not None
        states = prepare_head_input(output.hidden, self._model.config)
        return states[torch.tensor(list(indices), device=states.device)]


@dataclass(frozen=True)
class DecodeOutput:
    """Output from a forward pass over a `SpanRow`."""

    row: SpanRow
    hidden: torch.Tensor | None
    """[tokens / sequence-parallel size, 1, hidden] on the last pipeline stage, None on other stages."""
    routes: torch.Tensor | None = None
    """[tokens, MoE layers, top_k] expert indices on the CPU, on every process of the replica's tp x pp group.
    None: not recorded."""


@contextlib.contextmanager
def use_plain_products(model: LanguageModel) -> Iterator[None]:
    """Compute Megatron-Core's unsplit linear layers as plain products: its autograd functions take 7 of the
    25 ms of a token in 30 small layers on a CPU."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    linears: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and m.tp_group.size() == 1]
    for linear in linears:
        linear.forward = partial(_multiply, linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _multiply(linear: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output and the bias that the caller adds."""
    output = inputs @ linear.weight.t()
    is_caller_adding = linear.bias is None or linear.skip_bias_add
    return (output, linear.bias) if is_caller_adding else (output + linear.bias, None)


def get_replica_rank() -> tuple[int, int]:
    """Return (rank, size) among the processes that read different sequences: data and context parallel."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group.rank(), group.size()


def all_reduce_replicas(values: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce a tensor over the replicas, which read different sequences (default: sum)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return values
    total = collectives.to_comm_device(values.clone())
    dist.all_reduce(total, operation, group)
    return total.cpu()
