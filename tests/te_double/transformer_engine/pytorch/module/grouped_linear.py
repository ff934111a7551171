"""Several linear layers of one shape, each for its own rows of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..gemm import gemm
from .base import TransformerEngineBaseModule
from .weight_gradient import weight_gradient


class _Products(torch.autograd.Function):
    """y_i = x_i W_i^T for every group i of rows."""

    @staticmethod
    def forward(ctx: Any, inp: torch.Tensor, splits: list[int], module: GroupedLinear,
                is_first_microbatch: bool | None, *weights: torch.Tensor) -> torch.Tensor:
        ctx.module, ctx.recipe, ctx.splits = module, module._recipe(), splits
        ctx.weights, ctx.overwrites = weights, bool(is_first_microbatch)
        ctx.save_for_backward(inp)
        return torch.cat([gemm(x, w.detach().t(), "fprop", ctx.recipe)
                          for x, w in zip(inp.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        inp, = ctx.saved_tensors
        parts = gradients[0].split(ctx.splits)
        d_inp = None
        if ctx.needs_input_grad[0]:
            d_inp = torch.cat([gemm(g, w.detach(), "dgrad", ctx.recipe)
                               for g, w in zip(parts, ctx.weights, strict=True)])
        d_weights: list[Any] = [None] * len(ctx.weights)
        if ctx.needs_input_grad[4]:
            d_weights = ctx.module._leave(ctx.weights, parts, inp.split(ctx.splits), ctx.recipe,
                                         ctx.overwrites)
        return d_inp, None, None, None, *d_weights


class GroupedLinear(TransformerEngineBaseModule):
    """Linear layers with the parameters `weight0`, `weight1`, ...; traffic is the caller's."""

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
        if single_grouped_weight or single_grouped_bias or use_grouped_tensor or (bias and not return_bias
                                                                                  and parallel_mode == "row"):
            raise NotImplementedError("the double's grouped layers have one weight per group")
        if ub_overlap_rs or ub_overlap_ag:
            raise ValueError("GroupedLinear doesn't support Userbuffer overlap.")
        self._take_group(tp_group, tp_size)
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input, self.ub_name = save_original_input, ub_name
        self.in_features, self.out_features = self._local_sizes(in_features, out_features, parallel_mode)
        weights = []
        for i in range(num_gemms):
            # unlike Linear, the real layer leaves its weights without marks of tensor parallelism
            weights.append(self._add_parameter(f"weight{i}", (self.out_features, self.in_features),
                                               params_dtype, device, init_method))
            if bias:
                self._add_parameter(f"bias{i}", (self.out_features,), params_dtype, device, init_method)
            else:
                setattr(self, f"bias{i}", torch.Tensor().to(dtype=params_dtype))
        if delay_wgrad_compute:
            self._delay_products(weights)

    def _leave(self, weights: Any, grads: Any, inputs: Any, recipe: Any, overwrites: bool) -> list[Any]:
        """Compute the weights' gradients now, or have `backward_dw` do it."""

        def gradients() -> list[Any]:
            return [weight_gradient(self, w, g, x, recipe, overwrites)
                    for w, g, x in zip(weights, grads, inputs, strict=True)]

        def later() -> None:
            for weight, found in zip(weights, gradients(), strict=True):
                if not self.fuse_wgrad_accumulation:
                    weight.grad = found

        if not self._delays_products:
            return gradients()
        self._delayed_products.append(later)
        return [None] * len(weights)

    def forward(self, inp: torch.Tensor, m_splits: Any, is_first_microbatch: bool | None = None,
                out: torch.Tensor | None = None, dgrad_out: torch.Tensor | None = None) -> Any:
        """Apply layer i to the next `m_splits[i]` rows of [rows, in]; returns the list of biases beside it
        where they are asked for."""
        if out is not None or dgrad_out is not None:
            raise NotImplementedError("the double writes into no buffers of the caller")
        splits = m_splits.tolist() if torch.is_tensor(m_splits) else list(m_splits)
        if len(splits) != self.num_gemms:
            raise ValueError(f"Shape of splits tensor ({(len(splits),)}) does not match number of GEMMs "
                             f"({self.num_gemms}).")
        inp = self.prepare_forward(inp, self.num_gemms)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        product: torch.Tensor = _Products.apply(inp, splits, self, is_first_microbatch, *weights)
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        if self.return_bias:
            return product, biases
        if self.use_bias:
            product = torch.cat([x + b for x, b in zip(product.split(splits), biases, strict=True)])
        return product
