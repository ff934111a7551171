"""Operations over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MultiTensorApply:
    """Applies an operation to lists of tensors, without the places where the first list has empty tensors."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(self, op: Callable[..., Any], noop_flag_buffer: torch.Tensor,
                 tensor_lists: list[list[torch.Tensor]], *args: Any) -> Any:
        if any(len(tensors) != len(tensor_lists[0]) for tensors in tensor_lists):
            raise RuntimeError("Expected aligned multi-tensor lists.")
        keep = [tensor.numel() > 0 for tensor in tensor_lists[0]]
        lists = [[t for t, is_kept in zip(tensors, keep, strict=True) if is_kept] for tensors in tensor_lists]
        return op(self.chunk_size, noop_flag_buffer, lists, *args) if lists[0] else None


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_scale(chunk_size: int, is_infinite: torch.Tensor, tensor_lists: list[list[torch.Tensor]],
                       scale: float) -> None:
    """Write scale * source into each target; set `is_infinite` to 1 if any source is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        if not source.isfinite().all():
            is_infinite.fill_(1)
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]],
                        per_tensor: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 norm of all tensors together, and the norm of each if `per_tensor` is set."""
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.zeros(0)
