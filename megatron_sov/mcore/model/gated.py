"""The gate of a feed-forward block on CPUs, where the library's kernel for it would be compiled: op by op it
adds an offset of zero, and autograd concatenates what it had split."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import mlp
from torch.autograd.function import once_differentiable


def gate_without_compiler() -> None:
    """Have the library's blocks gate by these where they would by its kernels."""
    mlp.bias_swiglu_impl, mlp.weighted_bias_swiglu_impl = _gated, _weighted


def _gated(values: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """[..., gate and up], [gate and up] -> [..., up]."""
    found: torch.Tensor = _Gated.apply(values if bias is None else values + bias)
    return found


def _weighted(values: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor,
              *_: Any) -> torch.Tensor:
    """[tokens, gate and up], [gate and up], [tokens, 1] -> [tokens, up]."""
    return (_gated(values, bias) * weights).to(values.dtype)


class _Gated(torch.autograd.Function):
    """``silu(gate) * up`` of both in one tensor, with the bits of autograd's own derivative."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        """[..., gate and up] -> [..., up]."""
        gate, up = values.chunk(2, dim=-1)
        passed = torch.nn.functional.silu(gate)
        ctx.save_for_backward(values, passed)
        return passed * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Write both derivatives where they belong."""
        values, passed = ctx.saved_tensors
        gate, up = values.chunk(2, dim=-1)
        found = torch.empty_like(values)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(gradient, passed, out=of_up)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=of_gate)
        return found
