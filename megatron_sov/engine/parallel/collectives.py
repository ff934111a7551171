"""Sums and broadcasts of small tensors over the process groups, on CPU and on GPU alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def to_comm_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor where the process group's backend can send it."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def data_place() -> tuple[int, int]:
    """Return this process's rank among the processes that read different data, and their number."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def all_reduce_dp(values: torch.Tensor) -> torch.Tensor:
    """Sum a float64 tensor over the processes that read different data, on every process.

    Processes that share a row (context parallelism) hold the same value, which counts once.
    """
    total = to_comm_device(values.clone())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.cpu()


def all_reduce_world(values: torch.Tensor) -> torch.Tensor:
    """Sum a float64 tensor over all processes."""
    total = to_comm_device(values.clone())
    dist.all_reduce(total)
    return total.cpu()


def of_all_ranks(value: float) -> list[float]:
    """Return each process's number, by rank; called by all together."""
    mine = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    mine[dist.get_rank()] = value
    return [float(v) for v in all_reduce_world(mine)]


def broadcast_from_first(said: bool) -> bool:
    """Return what rank 0 says, on every process; called by all together."""
    if dist.get_world_size() == 1:
        return said
    sent = to_comm_device(torch.tensor([said]).byte())
    dist.broadcast(sent, src=0)
    return bool(sent[0])


def broadcast_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the last pipeline stage holds it, on every stage."""
    sent = to_comm_device(values.clone())
    dist.broadcast(sent, src=parallel_state.get_pipeline_model_parallel_last_rank(),
                   group=parallel_state.get_pipeline_model_parallel_group())
    return sent.cpu()


def is_first_of_row() -> bool:
    """Return whether this process is the first of its pipeline stage's that work on the same row (tensor and
    context parallelism)."""
    return (int(parallel_state.get_tensor_model_parallel_rank()) == 0
            and int(parallel_state.get_context_parallel_rank()) == 0)
