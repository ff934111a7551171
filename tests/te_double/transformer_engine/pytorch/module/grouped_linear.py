"""Several linear layers of equal shape, each applied to its own group of input rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ...common.recipe import Float8CurrentScaling, NVFP4BlockScaling, Recipe
from .. import placement as machine
from ..gemm import weight_gemm
from ..placement import mark_host, on_host
from .base import TransformerEngineBaseModule
from .weight_gradient import stand_in, weight_gradient


class _Products(torch.autograd.Function):
    """y_i = x_i W_i^T for every group i of rows."""

    @staticmethod
    def forward(ctx: Any, inp: torch.Tensor, splits: list[int], module: GroupedLinear,
                is_first_microbatch: bool | None, *weights: torch.Tensor) -> torch.Tensor:
        ctx.module, ctx.recipe, ctx.splits = module, module._recipe(), splits
        ctx.weights, ctx.overwrites = weights, bool(is_first_microbatch)
        ctx.save_for_backward(inp)
        return torch.cat([weight_gemm(x, w, "fprop", ctx.recipe)
                          for x, w in zip(inp.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        inp, = ctx.saved_tensors
        parts = gradients[0].split(ctx.splits)
        d_inp = None
        if ctx.needs_input_grad[0]:
            d_inp = torch.cat([weight_gemm(g, w, "dgrad", ctx.recipe)
                               for g, w in zip(parts, ctx.weights, strict=True)])
        d_weights: list[Any] = [None] * len(ctx.weights)
        if ctx.needs_input_grad[4]:
            d_weights = ctx.module._compute_weight_grad(ctx.weights, parts, inp.split(ctx.splits), ctx.recipe,
                                                        ctx.overwrites)
        return d_inp, None, None, None, *d_weights


def takes_grouped_tensor(recipe: Recipe | None, dtype: torch.dtype) -> bool:
    """Return whether one kernel multiplies all groups, by the rules of
    `is_module_grouped_tensor_path_supported` for `CHIP` with a new cuBLAS."""
    blackwell = machine.CHIP.capability >= (10, 0)
    if dtype not in (torch.bfloat16, torch.float16) or not (9, 0) <= machine.CHIP.capability <= (11, 0):
        return False
    if recipe is None or recipe.float8_current_scaling():
        return True
    if recipe.float8_block_scaling() and blackwell:
        raise RuntimeError("use_grouped_tensor=True does not support the FP8 block-scaling recipe on "
                           "Blackwell GPUs: the native grouped FP8 block-scaling path is Hopper-only.")
    if isinstance(recipe, NVFP4BlockScaling):
        return blackwell and not recipe.disable_rht and not recipe.row_scaled_activation
    return recipe.float8_block_scaling() or (recipe.mxfp8() and blackwell)


class GroupedLinear(TransformerEngineBaseModule):
    """Linear layers with the parameters `weight0`, `weight1`, ...; the caller communicates between ranks."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, sequence_parallel: bool = False,
                 fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
                 get_rng_state_tracker: Callable[..., Any] | None = None,
                 rng_tracker_name: str | None = None, init_method: Callable[..., Any] | None = None,
                 bias: bool = True, return_bias: bool = False, params_dtype: torch.dtype | None = None,
                 parallel_mode: str | None = None, device: torch.device | str = "cuda",
                 ub_overlap_rs: bool = False, ub_overlap_ag: bool = False, ub_name: str | None = None,
                 delay_wgrad_compute: bool = False, save_original_input: bool = False,
                 single_grouped_weight: bool = False, single_grouped_bias: bool = False,
                 name: str | None = None, use_grouped_tensor: bool | None = None) -> None:
        super().__init__(name)
        if single_grouped_weight or single_grouped_bias or (bias and not return_bias
                                                            and parallel_mode == "row"):
            raise NotImplementedError("the double's grouped layers have one weight per group")
        if use_grouped_tensor is None:
            use_grouped_tensor = os.environ.get("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM", "0") != "0"
        if not isinstance(use_grouped_tensor, bool):
            raise TypeError(f"use_grouped_tensor must be a bool or None, got {type(use_grouped_tensor)}.")
        self.use_grouped_tensor = use_grouped_tensor
        if ub_overlap_rs or ub_overlap_ag:
            raise ValueError("GroupedLinear doesn't support Userbuffer overlap.")
        self._set_group(tp_group, tp_size)
        if self.tp_size > 1 and bias:
            raise ValueError("GroupedLinear doesn't support bias when TP > 1. Because the TP communication "
                             "is handled outside of this module.")
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input, self.ub_name = save_original_input, ub_name
        self.in_features, self.out_features = self._split_sizes(in_features, out_features, parallel_mode)
        weights = []
        for i in range(num_gemms):
            # unlike Linear, the real layer sets no tensor-parallel attributes on its weights
            weights.append(self._add_parameter(f"weight{i}", (self.out_features, self.in_features),
                                               params_dtype, device, init_method))
            if bias:
                self._add_parameter(f"bias{i}", (self.out_features,), params_dtype, device, init_method)
            else:
                setattr(self, f"bias{i}", torch.Tensor().to(dtype=params_dtype))
        if delay_wgrad_compute:
            self._delay_products(weights)

    def _compute_weight_grad(self, weights: Any, grads: Any, inputs: Any, recipe: Any,
                             overwrites: bool) -> list[Any]:
        """Compute the weight gradients now, or queue them for `backward_dw`."""

        def gradients() -> list[Any]:
            return [weight_gradient(self, w, g, x, recipe, overwrites)
                    for w, g, x in zip(weights, grads, inputs, strict=True)]

        def accumulate_later() -> None:
            for weight, found in zip(weights, gradients(), strict=True):
                if not self.fuse_wgrad_accumulation:
                    weight.grad = found

        if not self._delays_products:
            return gradients()
        self._delayed_products.append(accumulate_later)
        return [stand_in(self, weight) for weight in weights]

    def forward(self, inp: torch.Tensor, m_splits: Any, is_first_microbatch: bool | None = None,
                out: torch.Tensor | None = None, dgrad_out: torch.Tensor | None = None) -> Any:
        """Apply layer i to the next `m_splits[i]` rows of [rows, in]; `return_bias` adds the biases."""
        if out is not None or dgrad_out is not None:
            raise NotImplementedError("the double writes into no buffers of the caller")
        if not torch.is_tensor(m_splits):
            m_splits = mark_host(torch.tensor(m_splits, dtype=torch.int64))
        if m_splits.shape != (self.num_gemms,):
            raise ValueError(f"Shape of splits tensor ({tuple(m_splits.shape)}) does not match number of "
                             f"GEMMs ({self.num_gemms}).")
        inp = self.prepare_forward(inp, self.num_gemms)
        recipe = self._recipe()
        if isinstance(recipe, Float8CurrentScaling) and self.tp_size > 1:
            raise ValueError("GroupedLinear doesn't support TP > 1 with Float8 current scaling. Because the "
                             "TP communication is handled outside of this module.")
        if inp.shape[-1] != self.in_features:
            raise ValueError(f"Input tensor (shape={tuple(inp.shape)}) is not compatible with weight tensor "
                             f"(shape={(self.out_features, self.in_features)})")
        if self.use_grouped_tensor and takes_grouped_tensor(recipe, inp.dtype) and on_host(m_splits):
            raise ValueError("The native grouped_tensor path requires CUDA m_splits. Pass a CUDA int64 "
                             "tensor, or set use_grouped_tensor=False.")
        splits = m_splits.tolist()
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        product: torch.Tensor = _Products.apply(inp, splits, self, is_first_microbatch, *weights)
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        if self.return_bias:
            return product, biases
        if self.use_bias:
            product = torch.cat([x + b for x, b in zip(product.split(splits), biases, strict=True)])
        return product
