"""A process's part of a model without memory for it: built on meta tensors,
in one process that plays any rank of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sov.engine.mcore.parallel import cpu_shims
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.plan.footprint.held import StageParams

if TYPE_CHECKING:
    from megatron_sov.engine.mcore.model.language_model import LanguageModel


@dataclass(frozen=True)
class BuiltStage:
    """What one process of a pipeline stage, and all of them together, hold."""

    params: StageParams
    """Of the first process."""
    whole: int
    """Parameters of the stage, each counted once whatever it is split over."""


@contextlib.contextmanager
def fake_world(parallel: ParallelConfig, num_ranks: int, rank: int) -> Iterator[None]:
    """Have this process be one rank of a world in which nothing is sent anywhere; the library's groups are
    those of all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            parallel.tp, parallel.pp, parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp, expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def built_stage(config: RunConfig, num_ranks: int, stage: int) -> BuiltStage:
    """Return what a pipeline stage holds, from the very modules that training builds.

    Must run in a process that is in no process group and that computes on no GPU, before or afterwards;
    nothing is sent anywhere, and CUDA is not started where there is a GPU.
    """
    cpu_shims.prepare_without_gpu()
    import torch

    from megatron_sov.engine.mcore.model.language_model import build

    p = config.parallel
    with fake_world(p, num_ranks, stage * (num_ranks // p.pp)), torch.device("meta"):
        return _held(build(config.model, p, config.train), p)


def _held(model: LanguageModel, parallel: ParallelConfig) -> BuiltStage:
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
