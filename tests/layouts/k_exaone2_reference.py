"""K-EXAONE 2.0 in transformers' K-EXAONE class, which lacks per-layer windows and SwiGLU limits: both
follow vLLM's `exaone_moe` (`sliding_windows`, `swiglu_limits`)."""

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear, silu


def apply_layer_limits(model: Any) -> Any:
    """Set `sliding_windows` and `swiglu_limits` of the config in
    transformers' model; without them the model is unchanged."""
    config = model.config.to_dict()
    for layer, window in zip(model.model.layers, config.get("sliding_windows") or [], strict=False):
        layer.self_attn.register_forward_pre_hook(mask_by_window(window), with_kwargs=True)
    for layer, limit in zip(model.model.layers, config.get("swiglu_limits") or [], strict=False):
        for part in layer.mlp.modules() if limit else ():
            if hasattr(part, "gate_up_proj"):
                part.forward = MethodType(build_expert_forward(limit), part)
            elif hasattr(part, "gate_proj"):
                part.forward = MethodType(build_dense_forward(limit), part)
    return model


def mask_by_window(window: int) -> Any:
    """Return a hook that replaces a layer's mask by a causal mask over a window of tokens (0: unlimited)."""
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["hidden_states"].shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        visible = (distance >= 0) & ((distance < window) if window else (distance >= 0))
        hidden = torch.zeros(n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": hidden[None, None]}

    return hook


def apply_limited_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


def build_dense_forward(limit: float) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(apply_limited_swiglu(self.gate_proj(x), self.up_proj(x), limit))
        return found

    return forward


def build_expert_forward(limit: float) -> Any:
    def forward(self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, place = torch.where(chosen == expert)
            gate, up = linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            out = linear(apply_limited_swiglu(gate, up, limit), self.down_proj[expert])
            result = result.index_add(0, token, out * weights[token, place, None])
        return result

    return forward
