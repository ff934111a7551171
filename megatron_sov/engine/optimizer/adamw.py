"""AdamW without Transformer Engine or apex: fused by torch on the CPU, or with its state in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron_sov.engine.parallel.device import Arena, num_bytes

# Torch's fused AdamW on CPUs, with an element's result the same wherever the element lies.
#
# Its kernel computes whole vectors, and what is left of a tensor element by element, which rounds otherwise.
# Which elements are left depends on where ZeRO-1 cuts; here none is.

VECTOR_BYTES = 64
"""Of AVX-512; widths of other machines divide it."""


class CpuAdamW(torch.optim.AdamW):
    """AdamW over contiguous tensors in host memory."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update whole vectors in place, and what is left of each tensor in a vector of its own."""
        assert closure is None
        for group in self.param_groups:
            lists: tuple[list[torch.Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            *values, _, steps = lists
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            _update(group, [[_whole(t) for t in tensors] for tensors in values], steps)
            if not any(len(_rest(p)) for p in values[0]):
                continue
            rests = [[_rest(t) for t in tensors] for tensors in values]
            filled = [[torch.nn.functional.pad(r, (0, -len(r) % (VECTOR_BYTES // r.element_size())))
                       for r in tensors] for tensors in rests]
            _update(group, filled, steps)
            for kind in (0, 2, 3):  # the gradient stays
                for rest, updated in zip(rests[kind], filled[kind], strict=True):
                    rest.copy_(updated[:len(rest)])


def _num_whole(tensor: torch.Tensor) -> int:
    return tensor.numel() - tensor.numel() % (VECTOR_BYTES // tensor.element_size())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)[:_num_whole(tensor)]


def _rest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)[_num_whole(tensor):]


def _update(group: dict[str, Any], values: Sequence[list[torch.Tensor]], steps: list[torch.Tensor]) -> None:
    """Run the kernel over parameters, gradients and both moments."""
    beta1, beta2 = group["betas"]
    parameters, gradients, first, second = values
    torch._fused_adamw_(parameters, gradients, first, second, [], steps, lr=group["lr"], beta1=beta1,
                        beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                        maximize=False)


# AdamW in host memory: master weights, moments and the update of a share of what a process updates.
#
# The library's own (`HybridDeviceOptimizer`) keeps every master weight on the GPU as well unless Transformer
# Engine's optimizer holds them, makes its optimizers anew when a state is loaded, and can only be tried with
# a GPU. This one moves the master weights themselves, so that the library's copies to and from the model's
# weights, its gradient norm and our checkpoints find them where they are.

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
    stays: list[dict[str, Any]] = []
    moves: list[dict[str, Any]] = []
    for group in groups:
        on_gpu = [p for p in group["params"] if id(p) not in moved]
        on_host = [p for p in group["params"] if id(p) in moved]
        # a group may be on one side alone, and torch takes none without parameters
        if on_gpu:
            stays.append({**group, "params": on_gpu})
        if on_host:
            moves.append({**group, "params": on_host})
    return stays, moves
