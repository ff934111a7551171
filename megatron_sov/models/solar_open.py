"""Solar Open (`solar_open`): mixture of experts in every layer, global attention with RoPE, no QK-norm."""

from __future__ import annotations

from megatron_sov.models.family import (
    DECODER_CONFIG,
    DEEPSEEK_ROUTER,
    DEEPSEEK_ROUTER_CONFIG,
    EXPERT_GROUPS,
    EXPERTS_CONFIG,
    KV_HEADS,
    Family,
)
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, Unused
from megatron_sov.models.weights import (
    ATTENTION,
    DEEPSEEK_EXPERTS,
    EMBEDDINGS_AND_HEAD,
    trunk,
)

FAMILY = Family(
    name="solar_open",
    hf_classes=("SolarOpenForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", ATTENTION),
        trunk("moe layers", DEEPSEEK_EXPERTS),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG,
        Fixed("tie_word_embeddings", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5), Renamed("head_dim", "head_dim", 128),
        Renamed("n_routed_experts", "num_experts", 128), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0), Rope(default_theta=1e6),
        # transformers stores these and ignores them, so any other value would silently be another model
        Fixed("first_k_dense_replace", 0, written=False), Fixed("use_qk_norm", False, written=False),
        Fixed("partial_rotary_factor", 1.0, written=False),
        Fixed("num_nextn_predict_layers", 0, written=False),
        Unused(("intermediate_size",)),  # the published config has it; no layer is dense
    ),
    structure={**DEEPSEEK_ROUTER, "num_dense_layers": 0, "dense_ffn_dim": 0, "attention_pattern": "G",
               "sliding_window_tokens": 0, "rope_on_global": True, "qkv_bias": False, "qk_norm": False,
               "tied_embeddings": False, "num_mtp_layers": 0},
    varies=EXPERT_GROUPS,
    needs_shared_expert=True,
)
