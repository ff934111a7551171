"""Normalization, computed at least in float32 like the kernels."""

from __future__ import annotations

from typing import Any

import torch


def normalize(inp: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
              kind: str, zero_centered_gamma: bool) -> torch.Tensor:
    """Apply RMSNorm (Zhang and Sennrich, arXiv 1910.07467, eq. 4) or LayerNorm over the last axis."""
    wide = torch.promote_types(inp.dtype, torch.float32)
    x, gain = inp.to(wide), weight.to(wide) + (1 if zero_centered_gamma else 0)
    if kind == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
    return (out if bias is None else out + bias.to(wide)).to(inp.dtype)


class _Norm(torch.nn.Module):
    """Parameters and forward pass of both norms."""

    kind = ""

    def __init__(self, normalized_shape: Any = None, eps: float = 1e-5,
                 sequence_parallel: bool | None = None, params_dtype: torch.dtype | None = None,
                 zero_centered_gamma: bool = False, hidden_size: int | None = None, **kwargs: Any) -> None:
        if (normalized_shape is None) == (hidden_size is None):
            raise RuntimeError("give either normalized_shape or hidden_size (deprecated)")
        super().__init__()
        size = hidden_size if normalized_shape is None else normalized_shape
        place = {"dtype": params_dtype or kwargs.get("dtype"), "device": kwargs.get("device", "cuda")}
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        start = 0.0 if zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((size,), start, **place))  # type: ignore[arg-type]
        self.bias = (torch.nn.Parameter(torch.zeros(size, **place))  # type: ignore[call-overload]
                     if self.kind == "LayerNorm" else None)
        for parameter in self.parameters():
            if sequence_parallel is not None:
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor, *extra_inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Normalize `input` [..., size] over the last axis."""
        if extra_inputs or kwargs:
            raise NotImplementedError("the double's norms take one input")
        return normalize(input, self.weight, self.bias, self.eps, self.kind, self.zero_centered_gamma)

    def get_extra_state(self) -> torch.Tensor:
        """Return no bytes: a norm has no products."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Accept the result of `get_extra_state`, which is empty."""


class RMSNorm(_Norm):
    """Root mean square normalization."""

    kind = "RMSNorm"


class LayerNorm(_Norm):
    """Layer normalization."""

    kind = "LayerNorm"
