"""Matrix product of all linear layers, the only place that quantizes operands.

Not part of the real interface.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch

from ..common.recipe import (
    Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe)
from .quantized_tensor import QuantizedTensor

Kind = Literal["fprop", "dgrad", "wgrad"]

COUNTS: Counter[tuple[Kind | Literal["general"], str]] = Counter()
"""(kind, recipe class name or "") -> number of products; for `general_gemm` the kind contains the layout."""
SUMMED_AT_ONCE = 32
"""Number of products that Hopper's tensor cores add before they round the sum into the accumulator."""
FAST_BITS = 13
"""Fraction bits of a sum in fast accumulation (DeepSeek-V3, arXiv 2412.19437, section 3.5.2)."""


def gemm(a: torch.Tensor, b: torch.Tensor, kind: Kind, recipe: Recipe | None = None,
         out_dtype: torch.dtype | None = None, b_is_quantized: bool = False) -> torch.Tensor:
    """Return a @ b.

    Blocks of values that share a scale extend along the summed axis, the last of `a` and the first of `b`:

    - fprop: input [tokens, in] @ transposed weight [in, out],
    - dgrad: output gradient [tokens, out] @ weight [out, in],
    - wgrad: transposed output gradient [out, tokens] @ input [tokens, in].

    Args:
        a: [rows, summed].
        b: [summed, columns].
        kind: kind of the product in the layer.
        recipe: recipe of the forward pass; None: no quantization.
        out_dtype: dtype of the result, without rounding on the way; None: dtype of `a`.
        b_is_quantized: whether `b` holds the float32 values of an FP8 weight.

    Raises:
        RuntimeError: the recipe's kernels do not support the shape.
    """
    COUNTS[kind, type(recipe).__name__ if recipe is not None else ""] += 1
    check_aligned(a, b, recipe)
    if out_dtype is not None:
        a = a.to(out_dtype)
    return a @ b.to(a.dtype)


def weight_gemm(a: torch.Tensor, weight: torch.Tensor, kind: Kind, recipe: Recipe | None) -> torch.Tensor:
    """Return the product with a weight [out, in], which may be FP8: fprop or dgrad."""
    is_quantized = isinstance(weight, QuantizedTensor)
    if not isinstance(weight, QuantizedTensor):
        b = weight.detach()
    elif recipe is None:
        b = weight.dequantize(dtype=a.dtype)
    else:
        b = weight._values(columnwise=kind == "dgrad")
    return gemm(a, b.t() if kind == "fprop" else b, kind, recipe,
                b_is_quantized=is_quantized and recipe is not None)


def check_aligned(a: torch.Tensor, b: torch.Tensor, recipe: Recipe | None) -> None:
    """Raise RuntimeError for shapes that the recipe's kernels do not support; empty operands are accepted."""
    if recipe is None or not a.numel() or not b.numel():
        return
    (rows, summed), columns = a.shape, b.shape[1]
    for kind, block, name in ((MXFP8BlockScaling, 32, "MXFP8"), (NVFP4BlockScaling, 16, "NVFP4")):
        if isinstance(recipe, kind) and (rows % block or summed % block or columns % block):
            raise RuntimeError(f"{name} requires tensor dims that are divisible by {block} (got shape="
                               f"{[rows, summed]} and {[summed, columns]})")
    if isinstance(recipe, (MXFP8BlockScaling, NVFP4BlockScaling)):
        return
    # Hopper's products need both operands with the summed axis last
    if summed % 16:
        raise RuntimeError(f"Leading dimension requirement on A for FP8 GEMM. Caller must pad. ({summed})")
    if columns % 8 or (isinstance(recipe, Float8BlockScaling) and rows % 8):
        raise RuntimeError(f"Outer dimension requirement for FP8 GEMM. Caller must pad. ({rows}, {columns})")


def accumulates_fast(kind: Kind, recipe: Recipe | None) -> bool:
    """Return whether Hopper's tensor cores accumulate a product of this kind with reduced precision."""
    if isinstance(recipe, Float8CurrentScaling):
        settings: Any = getattr(recipe, f"fp8_gemm_{kind}")
        return not settings.use_split_accumulator
    return recipe is not None and recipe.delayed() and kind == "fprop"


def fast_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b [rows, columns] in float32 with Hopper's fast accumulation: after every `SUMMED_AT_ONCE`
    products the sum is cut to `FAST_BITS` fraction bits of the larger of sum and addend."""
    total = a.new_zeros(len(a), b.shape[1], dtype=torch.float32)
    for x, y in zip(a.float().split(SUMMED_AT_ONCE, 1), b.float().split(SUMMED_AT_ONCE, 0), strict=True):
        part = x @ y
        exponent = torch.maximum(total.abs(), part.abs()).frexp().exponent
        unit = torch.ldexp(torch.ones_like(total), exponent - 1 - FAST_BITS)
        total = ((total / unit).trunc() + (part / unit).trunc()) * unit
    return total
