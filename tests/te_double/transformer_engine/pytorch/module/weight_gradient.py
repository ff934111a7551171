"""Where a weight's gradient goes: to autograd, straight into `main_grad`, or to a later call."""

from __future__ import annotations

from typing import Any

import torch

from ...common.recipe import Recipe
from ..gemm import gemm
from .base import TransformerEngineBaseModule, get_dummy_wgrad


def weight_gradient(module: TransformerEngineBaseModule, weight: torch.Tensor, grad: torch.Tensor,
                    inp: torch.Tensor, recipe: Recipe | None, overwrites: bool) -> torch.Tensor | None:
    """Compute a weight's gradient; return the value that autograd receives for it.

    Args:
        module: has `fuse_wgrad_accumulation`.
        weight: [out, in].
        grad: [tokens, out], of the output.
        inp: [tokens, in].
        recipe: the quantisation.
        overwrites: with fused accumulation: whether `main_grad` is set and not added to, as in the first
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
