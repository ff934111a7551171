"""AdamW as the fused kernel does it: updates counted per group, moments and masters in their own dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def _with_remainder(parameter: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 master of bf16 weights and the int16 that were rounded away."""
    high = parameter.detach().view(torch.int16).int() - (remainder < 0).int()
    return (high << 16 | remainder.int() & 0xFFFF).view(torch.float32)


def _split_off_remainder(master: torch.Tensor, parameter: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write a float32 master back as bf16 weights and the int16 beside them."""
    bits = master.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int32)
    low = torch.where(low >= 1 << 15, low - (1 << 16), low)
    remainder.copy_(low)
    parameter.view(torch.int16).copy_((bits >> 16) + (low < 0).int())


class FusedAdam(torch.optim.Optimizer):
    """AdamW."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *,
                 bias_correction: bool = True, adam_w_mode: bool = True, capturable: bool = False,
                 master_weights: bool = False, master_weight_dtype: torch.dtype = torch.float32,
                 exp_avg_dtype: torch.dtype = torch.float32, exp_avg_sq_dtype: torch.dtype = torch.float32,
                 use_decoupled_grad: bool = False, store_param_remainders: bool = False,
                 set_grad_none: bool | None = None) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable or not adam_w_mode:
            raise NotImplementedError("the double has AdamW outside of CUDA graphs only")
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype,
                       "master_param": master_weight_dtype}
        if not set(self.dtypes.values()) <= {torch.float32, torch.float16, torch.bfloat16}:
            raise NotImplementedError("the double has states in fp32, bf16 and fp16 only")
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.store_param_remainders = (store_param_remainders and master_weights
                                       and master_weight_dtype == torch.float32)
        self._scales: dict[Any, dict[str, torch.Tensor]] = {}

    def _keeps_remainder(self, param: torch.Tensor, name: str) -> bool:
        return self.store_param_remainders and name == "master_param" and param.dtype == torch.bfloat16

    def initialize_state(self, param: Any, store_param_remainders: bool) -> None:
        """Make a parameter's state: zeros, and its master weights where they are kept here."""
        names = ["exp_avg", "exp_avg_sq", *(["master_param"] if self.master_weights else [])]
        for name in names:
            dtype = torch.int16 if self._keeps_remainder(param, name) else self.dtypes[name]
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
            if self.dtypes[name] != torch.float32:
                self._scales.setdefault(param, {})[name] = torch.ones(1)
        if self.master_weights and not store_param_remainders:
            self.set_scaled_state(param, "master_param", param.detach().float())

    def get_unscaled_state(self, param: Any, state_name: str, skip_unscale: bool = False) -> torch.Tensor:
        """Return a state in float32 (bf16 weights' remainders: as they are)."""
        state: torch.Tensor = self.state[param][state_name]
        if state.dtype == torch.float16:
            return state.float() * self._scales[param][state_name]
        return state if skip_unscale or state.dtype in (torch.float32, torch.int16) else state.float()

    def set_scaled_state(self, param: Any, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Write a state given in float32; fp16 ones get the scale that fills their range by half."""
        remainder = self._keeps_remainder(param, state_name)
        assert unscaled_state.dtype == (torch.int16 if remainder else torch.float32)
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.zeros_like(
                param, dtype=torch.int16 if remainder else self.dtypes[state_name])
            if self.dtypes[state_name] != torch.float32:
                self._scales.setdefault(param, {})[state_name] = torch.ones(1)
        if state[state_name].dtype == torch.float16:
            scale = unscaled_state.abs().max() / (torch.finfo(torch.float16).max / 2)
            self._scales[param][state_name].copy_(scale)
            unscaled_state = unscaled_state / torch.where(scale > 0, scale, torch.ones_like(scale))
        state[state_name].copy_(unscaled_state)

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # type: ignore[override]
        """Forget all gradients of the kind that `step` reads."""
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for param in (p for group in self.param_groups for p in group["params"]):
            if set_to_none is None or set_to_none:
                setattr(param, name, None)
            elif getattr(param, name) is not None:
                getattr(param, name).zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None,  # type: ignore[override]
             grad_scaler: Any = None) -> None:
        """Update all parameters by their gradients; every group counts, also one without
        parameters or gradients."""
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for param in group["params"]:
                if len(self.state[param]) == 0:
                    self.initialize_state(param, self._keeps_remainder(param, "master_param"))
                gradient = (getattr(param, "decoupled_grad", None) if self.use_decoupled_grad
                            else param.grad)
                if gradient is not None:
                    self._update(param, gradient, group)

    def _update(self, param: Any, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        if param.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise RuntimeError("FusedAdam only support model weights in fp32, fp16, bf16 and fp8")
        (beta1, beta2), step = group["betas"], group["step"]
        grad = gradient.float()
        first = self.get_unscaled_state(param, "exp_avg").float()
        second = self.get_unscaled_state(param, "exp_avg_sq").float()
        own_master = self.master_weights and param.dtype != torch.float32
        if not own_master:
            master = param.float()
        elif self._keeps_remainder(param, "master_param"):
            master = _with_remainder(param, self.state[param]["master_param"])
        else:
            master = self.get_unscaled_state(param, "master_param").float()
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad.square()
        corrected = (1 - beta1 ** step, 1 - beta2 ** step) if group["bias_correction"] else (1, 1)
        change = first / corrected[0] / ((second / corrected[1]).sqrt() + group["eps"])
        master = master - group["lr"] * (change + group["weight_decay"] * master)
        self.set_scaled_state(param, "exp_avg", first)
        self.set_scaled_state(param, "exp_avg_sq", second)
        if own_master and self._keeps_remainder(param, "master_param"):
            _split_off_remainder(master, param, self.state[param]["master_param"])
            return
        if own_master:
            self.set_scaled_state(param, "master_param", master)
        param.copy_(master)
