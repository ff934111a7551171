"""Torch's fused AdamW on CPUs, with an element's result the same wherever the element lies.

Its kernel computes whole vectors, and what is left of a tensor element by element, which rounds otherwise.
Which elements are left depends on where ZeRO-1 cuts; here none is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

VECTOR_BYTES = 64
"""Of AVX-512; widths of other machines divide it."""


class CpuAdamW(torch.optim.AdamW):
    """AdamW over contiguous tensors in host memory."""

    def __init__(self, params: Any, **settings: Any) -> None:
        """Args: as of torch's."""
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
    """Return how many elements fill whole vectors."""
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
