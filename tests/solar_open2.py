"""Solar Open 2 for a transformers that does not have it: its own classes of Solar Open, with attention
written out here head by head, and Kimi Delta Attention as a loop over tokens (arXiv 2510.26692).

Names of fields and tensors are those of `solar_open2` in transformers' main branch (pull request 47585).
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, rms_norm, silu, softplus
from transformers import AutoConfig, AutoModelForCausalLM, SolarOpenConfig, SolarOpenForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.solar_open.modeling_solar_open import SolarOpenMLP, SolarOpenRMSNorm

FAMILY = "solar_open2"


class SolarOpen2Config(SolarOpenConfig):
    """Fields that Solar Open lacks, with their defaults."""

    model_type = FAMILY
    max_position_embeddings: int = 1_048_576
    n_routed_experts: int = 320
    intermediate_size: int = 10240
    first_k_dense_replace: int = 0
    layer_types: list[str] | None = None
    gqa_interval: int = 3
    gqa_layers: list[int] | None = None
    linear_attn_config: dict[str, Any] | None = None
    use_rope: bool = False
    use_qk_norm: bool = False
    use_gqa_gate: bool = True
    use_gqa_gate_bias: bool = False
    kda_use_full_proj: bool = False
    kda_allow_neg_eigval: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.linear_attn_config = self.linear_attn_config or {
            "short_conv_kernel_size": 4, "head_dim": self.head_dim, "num_heads": self.num_attention_heads,
            "num_kv_heads": None}
        softmax = self.gqa_layers or range(0, self.num_hidden_layers, self.gqa_interval + 1)
        self.layer_types = self.layer_types or [
            "full_attention" if i in softmax else "linear_attention" for i in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)


class SoftmaxAttention(nn.Module):
    """Grouped-query attention without rotary embedding, with its
    output gated by the sigmoid of a projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, queries = config.head_dim, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        for name, rows in (("q", queries), ("k", keys), ("v", keys), ("g", queries)):
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, rows, bias=False))
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm, self.k_norm = (SolarOpenRMSNorm(self.width, config.rms_norm_eps) for _ in "qk")

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (proj(hidden_states).unflatten(-1, (-1, self.width))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        n, share = q.shape[1], q.shape[2] // k.shape[2]
        later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        found = []
        for head in range(q.shape[2]):
            products = q[:, :, head] @ k[:, :, head // share].mT * self.width ** -0.5
            weights = products.masked_fill(later, -torch.inf).softmax(-1)
            found.append(weights @ v[:, :, head // share])
        return self.o_proj(torch.cat(found, -1) * self.g_proj(hidden_states).sigmoid()), None


class DeltaAttention(nn.Module):
    """S <- exp(g) S;  S <- S + b k (v - S^T k)^T;  output = S^T q, with b of up to 2."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes, hidden = config.linear_attn_config, config.hidden_size
        self.heads, self.width = sizes["num_heads"], sizes["head_dim"]
        rows, self.eps = self.heads * self.width, config.rms_norm_eps
        self.most = 2 if config.kda_allow_neg_eigval else 1
        for name, (inputs, outputs) in {
                "q_proj": (hidden, rows), "k_proj": (hidden, rows), "v_proj": (hidden, rows),
                "b_proj": (hidden, self.heads), "f_a_proj": (hidden, self.width),
                "f_b_proj": (self.width, rows), "g_a_proj": (hidden, self.width),
                "g_b_proj": (self.width, rows), "o_proj": (rows, hidden)}.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        taps = sizes["short_conv_kernel_size"]
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(rows, rows, taps, groups=rows, padding=taps - 1, bias=False) for _ in "qkv")
        self.dt_bias = nn.Parameter(torch.ones(rows))
        self.A_log = nn.Parameter(torch.zeros(1, 1, self.heads, 1))
        self.o_norm = SolarOpenRMSNorm(self.width, self.eps)

    def _of_heads(self, x: Tensor, proj: Any, taps: Any) -> Tensor:
        result = conv1d(proj(x).mT, taps.weight, padding=taps.padding, groups=taps.groups)
        return silu(result[..., :x.shape[1]]).mT.unflatten(-1, (self.heads, self.width))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        x, wide = hidden_states, torch.promote_types(hidden_states.dtype, torch.float32)
        q, k, v = (self._of_heads(x, proj, taps).to(wide) for proj, taps in (
            (self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d)))
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        steps = softplus((self.f_b_proj(self.f_a_proj(x)) + self.dt_bias).to(wide))
        kept = (-self.A_log.to(wide).exp() * steps.unflatten(-1, (self.heads, self.width))).exp()
        rate = self.most * self.b_proj(x).to(wide).sigmoid()
        state, found = q.new_zeros(len(x), self.heads, self.width, self.width), []
        for i in range(x.shape[1]):
            state = state * kept[:, i, :, :, None]
            error = v[:, i] - torch.einsum("nhkv,nhk->nhv", state, k[:, i])
            state = state + torch.einsum("nhk,nhv->nhkv", rate[:, i, :, None] * k[:, i], error)
            found.append(torch.einsum("nhkv,nhk->nhv", state, q[:, i] * self.width ** -0.5))
        normed = rms_norm(torch.stack(found, 1), (self.width,), self.o_norm.weight.to(wide), self.eps)
        gate = self.g_b_proj(self.g_a_proj(x)).to(wide).sigmoid()
        return self.o_proj((normed.flatten(2) * gate).to(x.dtype)), None


class SolarOpen2ForCausalLM(SolarOpenForCausalLM):
    """Solar Open with both kinds of attention in place of its own,
    and with dense layers if the config has any."""

    config_class = SolarOpen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i, (layer, kind) in enumerate(zip(self.model.layers, config.layer_types, strict=True)):
            layer.self_attn = (SoftmaxAttention if kind == "full_attention" else DeltaAttention)(config)
            if i < config.first_k_dense_replace:
                layer.mlp = SolarOpenMLP(config, config.intermediate_size)
        self.post_init()


def known_to_transformers() -> None:
    """Register the classes with `AutoConfig` and `AutoModelForCausalLM`, unless transformers has them."""
    if FAMILY not in CONFIG_MAPPING:
        AutoConfig.register(FAMILY, SolarOpen2Config)
        AutoModelForCausalLM.register(SolarOpen2Config, SolarOpen2ForCausalLM)
        mapping = get_checkpoint_conversion_mapping("solar_open")
        register_checkpoint_conversion_mapping(FAMILY, mapping)


if __name__ == "__main__":  # a command whose transformers knows it
    from megatron_sov.cli import main

    known_to_transformers()
    sys.exit(main(sys.argv[1:]))
