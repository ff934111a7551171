"""Reductions and broadcasts of small tensors over process groups, on CPUs and GPUs."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def to_comm_device(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor to the device that the process group's backend uses."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def get_data_rank() -> tuple[int, int]:
    """Return the data-parallel rank and size."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def all_reduce_dp(values: torch.Tensor) -> torch.Tensor:
    """Sum a float64 tensor over the data-parallel group.

    Processes that share a row (context parallelism) hold equal values, which count once."""
    total = to_comm_device(values.clone())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.cpu()


def all_reduce_world(values: torch.Tensor) -> torch.Tensor:
    """Sum a float64 tensor over every process, by `all_reduce`."""
    total = to_comm_device(values.clone())
    dist.all_reduce(total)
    return total.cpu()


def gather_numbers(value: float) -> list[float]:
    """Return a number per rank, by `all_gather`. Collective."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    return [float(v) for v in all_reduce_world(values)]


def broadcast_flag(flag: bool) -> bool:
    """Return rank 0's flag on every process. Collective."""
    if dist.get_world_size() == 1:
        return flag
    message = to_comm_device(torch.tensor([flag]).byte())
    dist.broadcast(message, src=0)
    return bool(message[0])


def broadcast_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    message = to_comm_device(values.clone())
    dist.broadcast(message, src=parallel_state.get_pipeline_model_parallel_last_rank(),
                   group=parallel_state.get_pipeline_model_parallel_group())
    return message.cpu()


def is_first_of_row() -> bool:
    """Return whether this process has tensor- and context-parallel rank 0."""
    return (int(parallel_state.get_tensor_model_parallel_rank()) == 0
            and int(parallel_state.get_context_parallel_rank()) == 0)
