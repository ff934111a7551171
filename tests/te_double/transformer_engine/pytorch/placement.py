"""The machine that the double stands for: which chip it has, and which tensors would not be on it.  Not a
part of the real library's interface.

On a CPU every tensor is where every other one is, so one that was never moved passes unseen.  Under
`HostTensors`, what is made without a device, read from numpy or copied to the CPU is marked, and so is what
is computed of marked tensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MARK = "_te_double_on_host"


@dataclass(frozen=True)
class Chip:
    """What the library asks a GPU and cuDNN."""

    capability: tuple[int, int]
    """Of the chip."""
    cudnn: tuple[int, int, int] = (9, 24, 0)
    """Version."""


HOPPER, BLACKWELL = Chip((9, 0)), Chip((10, 0))
CHIP = HOPPER
"""Which one answers; a test may set another."""


def on_host(tensor: Any) -> bool:
    """Return whether a tensor is one of those that would be on the CPU."""
    return getattr(tensor, MARK, False) is True


def mark_host(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as one that would be on the CPU."""
    setattr(tensor, MARK, True)
    return tensor


def require_cuda(**tensors: torch.Tensor | None) -> None:
    """Raise for tensors whose kernels would read the CPU's memory."""
    for name, tensor in tensors.items():
        if tensor is not None and on_host(tensor):
            raise ValueError(f"{name} must be a CUDA tensor, but got tensor on cpu.")
