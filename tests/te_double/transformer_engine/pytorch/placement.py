"""Where a tensor would be on a machine with a GPU.  Not a part of the real library's interface.

On a CPU every tensor is where every other one is, so one that was never moved passes unseen.  Under
`HostTensors`, what is made without a device, read from numpy or copied to the CPU is marked.
"""

from __future__ import annotations

from typing import Any

import torch

MARK = "_te_double_on_host"


def on_host(tensor: Any) -> bool:
    """Return whether a tensor is one of those that would be on the CPU."""
    return getattr(tensor, MARK, False) is True


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as one that would be on the CPU."""
    setattr(tensor, MARK, True)
    return tensor


def require_cuda(**tensors: torch.Tensor | None) -> None:
    """Raise for tensors whose kernels would read the CPU's memory."""
    for name, tensor in tensors.items():
        if tensor is not None and on_host(tensor):
            raise ValueError(f"{name} must be a CUDA tensor, but got tensor on cpu.")
