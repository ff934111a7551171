"""Weight gradients of linear layers: returned to autograd, or added to `main_grad`."""

from __future__ import annotations

from typing import Any

import torch

from ...common.recipe import Recipe
from ..gemm import gemm
from .base import TransformerEngineBaseModule, get_dummy_wgrad


def weight_gradient(module: TransformerEngineBaseModule, weight: torch.Tensor, grad: torch.Tensor,
                    inp: torch.Tensor, recipe: Recipe | None, overwrites: bool) -> torch.Tensor | None:
    """Compute the gradient of a weight; return the value for autograd.

    Args:
        module: has `fuse_wgrad_accumulation`.
        weight: [out, in].
        grad: output gradient [tokens, out].
        inp: [tokens, in].
        recipe: quantization recipe, or None.
        overwrites: with fused accumulation, overwrite `main_grad` instead of adding to it, as in the first
            micro-batch of a step.
    """
    if not module.fuse_wgrad_accumulation:
        return gemm(grad.t(), inp, "wgrad", recipe)
    main_grad: Any = weight.main_grad  # type: ignore[attr-defined]
    product = gemm(grad.t(), inp, "wgrad", recipe, main_grad.dtype)
    if overwrites:
        main_grad.copy_(product)
    else:
        main_grad.add_(product)
    return stand_in(module, weight)


def stand_in(module: TransformerEngineBaseModule, weight: Any) -> torch.Tensor | None:
    """Return the value that autograd receives for a weight's gradient in `main_grad`, now or later."""
    if not module.fuse_wgrad_accumulation or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))
