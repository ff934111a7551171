"""K-EXAONE (`exaone_moe`): sliding layers with RoPE, global layers without (NoPE), QK-norm, leading dense
layers, one MTP layer.

transformers' attention rotates only layers of type sliding_attention; there is no config field for it.  Its
model drops the `mtp.*` tensors on loading; inference engines read them for self-speculative decoding.  The
prediction layer is dense, and attends globally without RoPE unless `mtp_layer_types` says otherwise
(TensorRT-LLM, `modeling_exaone_moe.py`: "A MTP layer uses the global attention"; the released config:
`mtp_layer_types: ["full_attention"]`).
"""

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
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, hidden_over_heads
from megatron_sov.models.hf_layers import LeadingDenseLayers, PredictionLayer, SlidingLayers, Unclamped
from megatron_sov.models.weights import (
    ATTENTION,
    DENSE_FFN,
    EMBEDDINGS_AND_HEAD,
    QK_NORM,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    prediction_layer,
    router_bias,
    trunk,
)

FAMILY = Family(
    name="exaone_moe",
    # the second: configs made before transformers had it
    hf_classes=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", ATTENTION, QK_NORM),
        trunk("dense layers", DENSE_FFN),
        trunk("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS, (router_bias("mlp.e_score_correction_bias"),)),
        *prediction_layer(ATTENTION, QK_NORM, DENSE_FFN),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG,
        Fixed("tie_word_embeddings", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5), Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("num_experts", "num_experts", 64), Renamed("num_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 2.5),
        Rope(default_theta=10_000.0), SlidingLayers(default_window=4096), LeadingDenseLayers(default=1),
        PredictionLayer(), Unclamped("swiglu_limits"),
    ),
    structure={**DEEPSEEK_ROUTER, "rope_on_global": False, "qkv_bias": False, "qk_norm": True,
               "tied_embeddings": False},
    training={"router_bias_update_rate": 1e-4},
    varies=EXPERT_GROUPS,
    needs_shared_expert=True,
)
