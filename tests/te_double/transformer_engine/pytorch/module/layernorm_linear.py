"""A norm and a linear layer in one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .linear import Linear, mark_partial
from .norm import normalize


class LayerNormLinear(Linear):
    """y = norm(x) W^T + b; the norm sees the local part of a sequence-parallel input."""

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5,
                 sequence_parallel: bool = False, fuse_wgrad_accumulation: bool = False, tp_group: Any = None,
                 tp_size: int = 1, get_rng_state_tracker: Callable[..., Any] | None = None,
                 init_method: Callable[..., Any] | None = None, bias: bool = True,
                 normalization: str = "LayerNorm", return_bias: bool = False,
                 params_dtype: torch.dtype | None = None, parallel_mode: str | None = None,
                 return_layernorm_output: bool = False, return_layernorm_output_gathered: bool = False,
                 parameters_split: Any = None, zero_centered_gamma: bool = False,
                 device: torch.device | str = "cuda", ub_overlap_ag: bool = False,
                 ub_overlap_rs: bool = False, ub_overlap_rs_dgrad: bool = False, ub_bulk_wgrad: bool = False,
                 ub_bulk_dgrad: bool = False, ub_name: str | None = None, delay_wgrad_compute: bool = False,
                 symmetric_ar_type: str | None = None, name: str | None = None) -> None:
        if parallel_mode == "row":
            raise NotImplementedError("Normalization does not support tensor-parallel distribution.")
        if return_layernorm_output:
            raise NotImplementedError("the double does not return the output of the norm")
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
            get_rng_state_tracker, None, init_method, bias, return_bias, params_dtype, parallel_mode,
            parameters_split, device, ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad,
            ub_bulk_wgrad, ub_name, delay_wgrad_compute, symmetric_ar_type, name=name)
        del self.save_original_input  # the real module has no such setting
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        start = torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_
        weight = self._add_parameter("layer_norm_weight", (in_features,), params_dtype, device, start)
        mark_partial(weight, self.sequence_parallel)
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            del self.layer_norm_bias
            shift = self._add_parameter("layer_norm_bias", (in_features,), params_dtype, device,
                                       torch.nn.init.zeros_)
            mark_partial(shift, self.sequence_parallel)

        # the real module registers its norm first, and ZeRO-1 lays parameters out in that order
        for name in [name for name in self._parameters if not name.startswith("layer_norm")]:
            self._parameters[name] = self._parameters.pop(name)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None,
                fp8_output: bool | None = False, fp8_grad: bool | None = False) -> Any:
        """Apply norm and layer to [..., in]."""
        inp = self.prepare_forward(inp)
        normed = normalize(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization,
                           self.zero_centered_gamma)
        return self._product(normed, is_first_microbatch)
