"""A linear layer, whole or split over a tensor-parallel group by columns or rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..gemm import weight_gemm
from .base import TransformerEngineBaseModule
from .traffic import gather, reduce, reduce_scatter
from .weight_gradient import stand_in, weight_gradient


def check_executable(*tensors: torch.Tensor) -> None:
    """Raise ValueError for shapes that no quantized product supports, like `assert_dim_for_fp8_exec`."""
    for tensor in tensors:
        if math.prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
            raise ValueError("FP8 execution requires the product of all dimensions except the last to be "
                             "divisible by 8 and the last dimension to be divisible by 16, but got tensor "
                             f"with dims={list(tensor.size())}")


class _Product(torch.autograd.Function):
    """y = x W^T + b with the traffic of tensor and sequence parallelism."""

    @staticmethod
    def forward(ctx: Any, inp: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                module: Linear, is_first_microbatch: bool | None) -> torch.Tensor:
        ctx.module, ctx.recipe, ctx.overwrites = module, module._recipe(), bool(is_first_microbatch)
        if ctx.recipe is not None:
            check_executable(inp, weight)
        ctx.weight, ctx.has_bias = weight, bias is not None
        ctx.save_for_backward(inp)
        mode, sp, group = module.parallel_mode, module.sequence_parallel, module.tp_group
        total = gather(inp, group) if mode == "column" and sp else inp
        out = weight_gemm(total.flatten(0, -2), weight, "fprop", ctx.recipe)
        out = out.view(*total.shape[:-1], len(weight))
        if bias is not None:
            out = out + bias
        if mode == "row" and module.tp_size > 1:
            out = reduce_scatter(out, group) if sp else reduce(out, group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        module, weight = ctx.module, ctx.weight
        mode, sp, group = module.parallel_mode, module.sequence_parallel, module.tp_group
        inp, = ctx.saved_tensors
        grad = gather(gradients[0], group) if mode == "row" and sp else gradients[0]
        flat, d_inp, d_weight = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            d_inp = weight_gemm(flat, weight, "dgrad", ctx.recipe)
            d_inp = d_inp.view(*grad.shape[:-1], weight.shape[1])
            if mode == "column" and module.tp_size > 1:
                d_inp = reduce_scatter(d_inp, group) if sp else reduce(d_inp, group)
        if ctx.needs_input_grad[1]:
            total = (gather(inp, group) if mode == "column" and sp else inp).flatten(0, -2)
            d_weight = module._compute_weight_grad(weight, flat, total, ctx.recipe, ctx.overwrites)
        return d_inp, d_weight, flat.sum(0) if ctx.has_bias else None, None, None


def mark_split(parameter: Any, axis: int) -> None:
    """Mark a parameter, unless it is on the meta device, as split over the tensor-parallel group."""
    if parameter.device.type != "meta":
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, axis, 1


def mark_partial(parameter: Any, sequence_parallel: bool) -> None:
    """Mark a parameter, unless it is on the meta device, whose gradient must be summed over the group."""
    if parameter.device.type != "meta":
        parameter.sequence_parallel = sequence_parallel


class Linear(TransformerEngineBaseModule):
    """Linear layer y = x W^T + b, whole or split over a tensor-parallel group."""

    def __init__(self, in_features: int, out_features: int, sequence_parallel: bool = False,
                 fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
                 get_rng_state_tracker: Callable[..., Any] | None = None,
                 rng_tracker_name: str | None = None, init_method: Callable[..., Any] | None = None,
                 bias: bool = True, return_bias: bool = False, params_dtype: torch.dtype | None = None,
                 parallel_mode: str | None = None, parameters_split: Any = None,
                 device: torch.device | str = "cuda", ub_overlap_ag: bool = False,
                 ub_overlap_rs: bool = False, ub_overlap_rs_dgrad: bool = False, ub_bulk_dgrad: bool = False,
                 ub_bulk_wgrad: bool = False, ub_name: str | None = None, delay_wgrad_compute: bool = False,
                 symmetric_ar_type: str | None = None, save_original_input: bool = False,
                 name: str | None = None) -> None:
        super().__init__(name)
        if parameters_split or symmetric_ar_type or any(
                (ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad)):
            raise NotImplementedError("the double has no split parameters and no overlapped traffic")
        self._set_group(tp_group, tp_size)
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input, self.ub_name = save_original_input, ub_name
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.in_features, self.out_features = self._split_sizes(in_features, out_features, parallel_mode)
        weight = self._add_parameter("weight", (self.out_features, self.in_features), params_dtype, device,
                                    init_method)
        mark_split(weight, int(parallel_mode == "row"))  # like the real layer, even without parallelism
        self._add_bias(params_dtype, device)
        if delay_wgrad_compute:
            self._delay_products([weight, *([self.bias] if bias else [])])

    def _add_bias(self, dtype: torch.dtype | None, device: Any) -> None:
        if not self.use_bias:
            self.bias = torch.Tensor().to(dtype=dtype)
            return
        bias = self._add_parameter("bias", (self.out_features,), dtype, device, torch.nn.init.zeros_)
        if self.parallel_mode == "row":
            mark_partial(bias, self.sequence_parallel)
        elif self.parallel_mode == "column":
            mark_split(bias, 0)

    def _compute_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor, inp: torch.Tensor, recipe: Any,
                             overwrites: bool) -> torch.Tensor | None:
        """Compute the weight gradient now, or queue it for `backward_dw`."""
        if not self._delays_products:
            return weight_gradient(self, weight, grad, inp, recipe, overwrites)

        def accumulate_later() -> None:
            found = weight_gradient(self, weight, grad, inp, recipe, overwrites)
            if not self.fuse_wgrad_accumulation:
                weight.grad = found

        self._delayed_products.append(accumulate_later)
        return stand_in(self, weight)

    def _product(self, inp: torch.Tensor, is_first_microbatch: bool | None) -> Any:
        """Return the layer's output, and the bias if `return_bias` is set."""
        # the bias of a row-parallel layer is added after the sum over processes
        fused = self.apply_bias and self.parallel_mode != "row"
        out = _Product.apply(inp, self.weight, self.bias if fused else None, self, is_first_microbatch)
        if self.apply_bias and not fused:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None,
                fp8_output: bool | None = False, fp8_grad: bool | None = False) -> Any:
        """Apply the layer to [..., in]."""
        return self._product(self.prepare_forward(inp), is_first_microbatch)
