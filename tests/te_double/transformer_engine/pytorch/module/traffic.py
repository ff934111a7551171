"""Collectives along the first axis over a tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Concatenate the shards of all ranks along the first axis."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def reduce(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum over all ranks."""
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


def reduce_scatter(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's shard, along the first axis, of the sum over all ranks."""
    return reduce(tensor, group).chunk(group.size())[group.rank()].clone()  # a view would hold the whole sum
