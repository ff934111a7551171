"""GLM-4.5 and 4.6 (`glm4_moe`): half of each head rotates; biases on query, key and value; QK-norm in the
larger ones; leading dense layers, DeepSeek-V3's router and a shared expert.

Its prediction layer, which has experts of its own, stands in a folder as one more layer of the trunk, with
copies of embedding and head.  transformers' model drops it on loading; its `MtpModel` and vLLM read it.
"""

from __future__ import annotations

from megatron_sov.models.family import (
    DECODER_CONFIG,
    DEEPSEEK_ROUTER,
    DEEPSEEK_ROUTER_CONFIG,
    EXPERT_GROUPS,
    KV_HEADS,
    Family,
)
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, hidden_over_heads
from megatron_sov.models.hf_layers import LeadingDenseLayers, PredictionBehind
from megatron_sov.models.weights import (
    ATTENTION,
    COPIES_BEHIND,
    DEEPSEEK_EXPERTS,
    DENSE_FFN,
    EMBEDDINGS_AND_HEAD,
    PREDICTION_BEHIND,
    QK_NORM,
    QKV_BIAS,
    inside_prediction,
    trunk,
)

FAMILY = Family(
    name="glm4_moe",
    hf_classes=("Glm4MoeForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", ATTENTION),
        trunk("every layer", QKV_BIAS, when="qkv_bias"),
        trunk("every layer", QK_NORM, when="qk_norm"),
        trunk("dense layers", DENSE_FFN),
        trunk("moe layers", DEEPSEEK_EXPERTS),
        PREDICTION_BEHIND, inside_prediction(ATTENTION, DEEPSEEK_EXPERTS),
        inside_prediction(QKV_BIAS, when="qkv_bias"), inside_prediction(QK_NORM, when="qk_norm"),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *DEEPSEEK_ROUTER_CONFIG, Fixed("tie_word_embeddings", False),
        Renamed("num_experts_per_tok", "num_experts_per_token", 8),
        Renamed("moe_intermediate_size", "expert_ffn_dim", 1408),
        Renamed("attention_bias", "qkv_bias", False), Renamed("use_qk_norm", "qk_norm", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Renamed("head_dim", "head_dim", hidden_over_heads), Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("n_routed_experts", "num_experts", 128), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0),
        Rope(default_theta=10_000.0, default_share=0.5), LeadingDenseLayers(default=1),
        PredictionBehind(),
    ),
    structure={**DEEPSEEK_ROUTER, "attention_pattern": "G", "sliding_window_tokens": 0,
               "rope_on_global": True, "tied_embeddings": False},
    varies=("rope_share", "mtp_experts", *EXPERT_GROUPS),
    training={"router_bias_update_rate": 1e-3, "mtp_loss_coeff": 0.1},
    needs_shared_expert=True,
    copies=COPIES_BEHIND,
)
