"""Data parallelism: gradients are summed over processes and updated weights gathered,
beside the computation if so set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_sov.config import GpuConfig, ParallelConfig
from megatron_sov.config.gpu import AUTO
from megatron_sov.mcore.model.gpu_settings import gradient_settings
from megatron_sov.mcore.model.language_model import LanguageModel


def wrap(model: LanguageModel, parallel: ParallelConfig, gpu: GpuConfig = AUTO) -> list[Any]:
    """Wrap every chunk, and tell the pipeline schedules when to send.

    Gradients are plain sums of what the losses give.  With ZeRO-1 the model's parameters move into
    one buffer per dtype.
    """
    settings = DistributedDataParallelConfig(
        **gradient_settings(gpu, bf16=model.config.bf16),
        use_distributed_optimizer=parallel.zero1, overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # stages of an interleaved pipeline send at the same time, since one that sends computes more slowly
        align_param_gather=parallel.overlap_param_gather and parallel.vpp > 1,
        bucket_size=parallel.bucket_params or None)
    # the first chunk's gradients are the last to be ready, and only they are sent in several buckets
    wrapped = [DistributedDataParallel(model.config, settings, chunk, disable_bucketing=i > 0)
               for i, chunk in enumerate(model.chunks)]
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = _per_chunk([w.no_sync for w in wrapped])
        model.config.grad_sync_func = _per_chunk([w.start_grad_sync for w in wrapped])
    if parallel.overlap_param_gather:
        if settings.align_param_gather:
            model.config.param_sync_func = [w.start_param_sync for w in wrapped]
        if model.chunks[-1].post_process:
            model.chunks[-1].register_forward_hook(partial(_wait_for_head, wrapped[-1], model.head_weight))
    return wrapped


def _per_chunk(functions: list[Any]) -> Any:
    """Only schedules of an interleaved pipeline take lists."""
    return functions if len(functions) > 1 else functions[0]


def _wait_for_head(wrapped: Any, weight: torch.Tensor, *_: Any) -> None:
    """Wait for the head's updated weight once the last hidden states are there.

    The library waits whenever a module is called, but losses take the head's weight and
    never call its module.
    """
    wrapped.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=True)


def deferred_gather(wrapped: list[Any]) -> Callable[[], None] | None:
    """Return what gathers every process's updated weights at once, or None where the optimizer itself
    does so in each step."""
    if not wrapped[0].ddp_config.overlap_param_gather:
        return None

    def gather() -> None:
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)

    return gather
