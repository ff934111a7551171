"""AdamW in host memory: master weights, moments and the update of a share of what a process updates.

The library's own (`HybridDeviceOptimizer`) keeps every master weight on the GPU as well unless Transformer
Engine's optimizer holds them, makes its optimizers anew when a state is loaded, and can only be tried with a
GPU.  This one moves the master weights themselves, so that the library's copies to and from the model's
weights, its gradient norm and our checkpoints find them where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_sov.mcore.optimizer.cpu_adamw import CpuAdamW
from megatron_sov.mcore.parallel.host_memory import Arena, num_bytes


class HostAdamW(CpuAdamW):
    """Torch's AdamW for CPUs over master weights that it has moved into host memory."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        """Move master weights.

        Args:
            param_groups: float32 master weights under `params`, with their settings.
        """
        mains = [main for group in param_groups for main in group["params"]]
        arena = Arena(2 * sum(map(num_bytes, mains)))
        for main in mains:
            # the same tensor object: the library's lists of master weights and what it notes about them stay
            main.data = arena.like(main).copy_(main.data)
        super().__init__(param_groups)
        self._gradients = {main: arena.like(main) for main in mains}

    def receive(self, main: torch.Tensor, gradient: torch.Tensor) -> None:
        """Begin to copy a master weight's gradient from the GPU; `wait` before it is read."""
        main.grad = self._gradients[main].copy_(gradient.to(main.dtype), non_blocking=True)


def wait() -> None:
    """Wait until all gradients have been received."""
    torch.cuda.current_stream().synchronize()


def split(groups: list[dict[str, Any]], mains: Iterable[torch.Tensor],
          share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of what stays on the GPU, and of what moves: the first master weights that are
    `share` of all elements together, or more.

    Args:
        groups: AdamW's.
        mains: their master weights.
        share: of elements, 0 to 1.
    """
    sizes = {id(main): main.numel() for main in mains}
    wanted, moved = share * sum(sizes.values()), set[int]()
    for main, size in sizes.items():
        if wanted > 0:
            moved.add(main)
            wanted -= size
    sides = ([{**group, "params": [p for p in group["params"] if (id(p) in moved) == there]}
              for group in groups] for there in (False, True))
    stays, moves = ([group for group in side if group["params"]] for side in sides)
    return stays, moves
