"""The three matrix products of a linear layer with quantized operands, for each recipe of `train.fp8`.

Blocks and rotations lie along the summed axis, so each product quantizes its operands from their unquantized
values; no value is quantized twice.
"""

import torch

from .nvfp4 import nvfp4, rotated
from .scaling import blocks, mx, tensorwise

ROLES = {"fprop": ("input", "weight"), "dgrad": ("gradient", "weight"), "wgrad": ("gradient", "input")}
"""Product -> roles of its left and right operand."""


def product(a: torch.Tensor, b: torch.Tensor, kind: str, recipe: str, form: str = "e4m3") -> torch.Tensor:
    """Return the product a @ b of quantized operands, in float32: [rows, columns].

    Args:
        a: [rows, summed].
        b: [summed, columns].
        kind: fprop, dgrad or wgrad.
        recipe: a value of `train.fp8`.
        form: e4m3, or hybrid (e5m2 for gradients).
    """
    left, right = ROLES[kind]
    return quantized(a, left, kind, recipe, form) @ quantized(b.t(), right, kind, recipe, form).t()


def quantized(x: torch.Tensor, role: str, kind: str, recipe: str, form: str) -> torch.Tensor:
    """Return the quantized values of an operand [n, summed], in float32."""
    if x.numel() == 0:
        return x.float()
    form = "e5m2" if form == "hybrid" and role == "gradient" else "e4m3"
    if recipe == "tensorwise":
        return tensorwise(x, form)
    if recipe == "blockwise":
        return blocks(x, form, 128 if role == "weight" else 1)
    if recipe == "mxfp8":
        return mx(x, form)
    if role == "weight":
        return nvfp4(x, rows=16)
    if kind == "wgrad":
        x = rotated(x)
    return nvfp4(x, noise=torch.rand(x.shape, device=x.device) if role == "gradient" else None)
