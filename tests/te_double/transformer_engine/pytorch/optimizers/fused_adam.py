"""AdamW with the semantics of the fused kernel: a step count per group; moments and masters in own dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW with optional master weights."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *,
                 bias_correction: bool = True, adam_w_mode: bool = True, capturable: bool = False,
                 master_weights: bool = False, master_weight_dtype: torch.dtype = torch.float32,
                 exp_avg_dtype: torch.dtype = torch.float32, exp_avg_sq_dtype: torch.dtype = torch.float32,
                 use_decoupled_grad: bool = False, store_param_remainders: bool = False,
                 set_grad_none: bool | None = None) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable or not adam_w_mode or store_param_remainders:
            raise NotImplementedError("the double has AdamW outside of CUDA graphs, without remainders, only")
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype,
                       "master_param": master_weight_dtype}
        if not set(self.dtypes.values()) <= {torch.float32, torch.bfloat16}:
            raise NotImplementedError("the double has states in fp32 and bf16 only")
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad

    def initialize_state(self, param: Any, store_param_remainders: bool) -> None:
        """Set the moments of a parameter to zero, and its master weight (if used) to the parameter."""
        for name in ("exp_avg", "exp_avg_sq", *(["master_param"] if self.master_weights else [])):
            self.state[param][name] = torch.zeros_like(param, dtype=self.dtypes[name])
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().float())

    def get_unscaled_state(self, param: Any, state_name: str, skip_unscale: bool = False) -> torch.Tensor:
        """Return a state in float32."""
        state: torch.Tensor = self.state[param][state_name]
        return state if skip_unscale else state.float()

    def set_scaled_state(self, param: Any, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Write a state from its float32 value."""
        assert unscaled_state.dtype == torch.float32
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.zeros_like(param, dtype=self.dtypes[state_name])
        state[state_name].copy_(unscaled_state)

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # type: ignore[override]
        """Clear the gradients that `step` reads: `decoupled_grad` or `grad`."""
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for param in (p for group in self.param_groups for p in group["params"]):
            if set_to_none is None or set_to_none:
                setattr(param, name, None)
            elif getattr(param, name) is not None:
                getattr(param, name).zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None,  # type: ignore[override]
             grad_scaler: Any = None) -> None:
        """Update all parameters with a gradient; the step count of every group advances."""
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for param in group["params"]:
                if len(self.state[param]) == 0:
                    self.initialize_state(param, store_param_remainders=False)
                gradient = (getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad)
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
        master = self.get_unscaled_state(param, "master_param").float() if own_master else param.float()
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad.square()
        corrected = (1 - beta1 ** step, 1 - beta2 ** step) if group["bias_correction"] else (1, 1)
        change = first / corrected[0] / ((second / corrected[1]).sqrt() + group["eps"])
        master = master - group["lr"] * (change + group["weight_decay"] * master)
        self.set_scaled_state(param, "exp_avg", first)
        self.set_scaled_state(param, "exp_avg_sq", second)
        if own_master:
            self.set_scaled_state(param, "master_param", master)
        param.copy_(master)
