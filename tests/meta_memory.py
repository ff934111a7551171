"""Counts a training process's memory: builds model, gradient buffers and optimizer on meta tensors, for any
rank and world size.

On a machine with a GPU, call `cpu_shims.prepare_without_gpu()` before importing this module.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from layout_proof.cpu_shims import is_cpu_only
from megatron_sov.engine.model.language_model import LanguageModel, build_model, build_run_model
from megatron_sov.engine.optimizer import muon, parameter_groups
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel.world import create_groups
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.model.process_memory import StatePlace, States
from tests.plan.stage_counts import StageParams


@dataclass(frozen=True)
class BuiltStage:
    """A pipeline stage's parameters."""

    params: StageParams
    """Parameters on the stage's first process."""
    whole: int
    """Parameters in the whole stage, each counted once."""


@contextlib.contextmanager
def use_fake_world(parallel: ParallelConfig, num_ranks: int, rank: int) -> Iterator[None]:
    """Make this process a rank in a world without communication."""
    assert is_cpu_only(), "call cpu_shims.prepare_without_gpu() before importing this module"
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        create_groups(parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def count_stage_parameters(config: RunConfig, num_ranks: int, stage: int) -> BuiltStage:
    """Count a pipeline stage's parameters, with the modules that training builds.

    Requires a process without process groups and without CUDA, before and afterwards. Sends nothing and does
    not initialize CUDA.
    """
    p = config.parallel
    with use_fake_world(p, num_ranks, stage * (num_ranks // p.pp)), torch.device("meta"):
        return _count_parameters(build_model(config.model, p, config.train), p)


def _count_parameters(model: LanguageModel, parallel: ParallelConfig) -> BuiltStage:
    dense = experts = whole = 0
    for weight in model.parameters():
        if getattr(weight, "allreduce", True):
            dense += weight.numel()
            whole += weight.numel() * (parallel.tp if getattr(weight, "tensor_model_parallel", False) else 1)
        else:
            experts += weight.numel()
            whole += weight.numel() * parallel.ep * parallel.etp
    layers = sum(len(c.decoder.layers) + (len(c.mtp.layers) if c.mtp_process else 0) for c in model.chunks)
    return BuiltStage(StageParams(dense, experts, layers), whole)


@dataclass(frozen=True)
class MetaOptimizer:
    """A training process's memory."""

    states: States
    """Bytes per state kind."""
    stage: int
    """Pipeline stage index."""
    place: StatePlace
    """Data-parallel ranks."""
    shapes: list[list[tuple[int, ...]]]
    """Parameter shapes per chunk, in the library's registration order."""


def count_process_memory(config: RunConfig, num_ranks: int, rank: int) -> MetaOptimizer:
    """Count a process's memory, with the modules and optimizers that training builds.

    Same requirements as `count_stage_parameters`.
    """
    with use_fake_world(config.parallel, num_ranks, rank), _use_meta_memory():
        with torch.device("meta"):
            model = build_run_model(config)
        shapes = [[tuple(weight.shape) for weight in chunk.parameters()] for chunk in model.chunks]
        optimizer = Optimizer(model, config.optim, config.parallel, config.gpu)
        place = StatePlace(parallel_state.get_data_parallel_rank(with_context_parallel=True),
                           parallel_state.get_expert_data_parallel_rank())
        return MetaOptimizer(_count_states(model, optimizer),
                             parallel_state.get_pipeline_model_parallel_rank(),
                             place, shapes)


class _AnyName:
    """Contains every string: stands for the parameter names of other ranks."""

    def __contains__(self, item: object) -> bool:
        return True


class _HostDouble:
    """Stands for `HostAdamW`, which allocates real memory."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups
        self.state: Any = defaultdict(dict)

    def step(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def _use_meta_memory() -> Iterator[None]:
    """Create the library's buffers and `HostAdamW` state on meta tensors, and skip exchanges with other
    ranks.
    """
    original_type = torch.Tensor.type

    def get_type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        type_name = original_type(tensor, *args, **kwargs)
        return type_name.replace(".meta.", ".") if isinstance(type_name, str) else type_name

    with (mock.patch.object(torch.Tensor, "type", get_type_name),
          mock.patch.object(parameter_groups, "gather_objects", lambda value: [value, (_AnyName(), True)]),
          mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")),
          mock.patch.object(parameter_groups, "HostAdamW", _HostDouble),
          mock.patch.object(Optimizer, "_deferred_gather", lambda self: None),
          mock.patch.object(muon, "gather_objects", lambda value, group: [value])):
        yield


def _count_states(model: Any, optimizer: Any) -> States:
    """Count the bytes in weights, gradients, optimizer state and buffers."""
    storages, counters = {}, 0
    for chunk in model.chunks:
        for weight in chunk.parameters():
            storage = weight.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        counters += sum(buffer.nbytes for buffer in chunk.buffers())
    buffers = [buffer for wrapped in optimizer.wrapped
               for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers)]
    device = host = updated = 0
    for shard in optimizer.shards:
        size = sum(tensor.nbytes for tensor in shard.state().values())
        if isinstance(shard.inner, _HostDouble):
                host += size + 4 * shard.main.numel()  # plus a float32 gradient
        else:
            device += size
            updated += shard.main.numel()
    return States(weights=sum(storages.values()), gradients=sum(b.grad_data.nbytes for b in buffers),
                  optimizer=device, on_host=host, counters=counters, updated=updated,
                  elements=sum(weight.numel() for weight in model.parameters()))
