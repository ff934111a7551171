"""DeepSeek-V3 and R1, Kimi K2 (`deepseek_v3`): multi-head latent attention, leading dense layers,
DeepSeek-V3's router and a shared expert.

Its prediction layer, which has experts of its own, stands in a folder as one more layer of the trunk, with
copies of embedding and head.  transformers' model drops it on loading; its `MtpModel` and vLLM read it.
"""

from __future__ import annotations

from megatron_sov.models.family import (
    DECODER_CONFIG,
    DEEPSEEK_ROUTER,
    DEEPSEEK_ROUTER_CONFIG,
    EXPERT_GROUPS,
    EXPERTS_CONFIG,
    Family,
)
from megatron_sov.models.hf_config import Fixed, LatentHeads, LatentRope, Renamed, Unused
from megatron_sov.models.hf_layers import LeadingDenseLayers, PredictionBehind
from megatron_sov.models.weights import (
    COPIES_BEHIND,
    DEEPSEEK_EXPERTS,
    DENSE_FFN,
    EMBEDDINGS_AND_HEAD,
    PREDICTION_BEHIND,
    Same,
    WeightEntry,
    inside_prediction,
    trunk,
)

LATENT_ATTENTION: tuple[WeightEntry, ...] = (
    Same("input_layernorm.weight", "input_layernorm.weight", "H"),
    Same("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "C H"),
    Same("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight", "K"),
    Same("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "B K"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H O"),
)
"""All of it but the queries."""
QUERIES_OF_A_LATENT: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", "Q H"),
    Same("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight", "Q"),
    Same("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", "A Q"),
)
WHOLE_QUERIES: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "A H"),
)
FAMILY = Family(
    name="deepseek_v3",
    hf_classes=("DeepseekV3ForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", LATENT_ATTENTION),
        trunk("every layer", QUERIES_OF_A_LATENT, when="has_query_latent"),
        trunk("every layer", WHOLE_QUERIES, when="has_whole_queries"),
        trunk("dense layers", DENSE_FFN),
        trunk("moe layers", DEEPSEEK_EXPERTS),
        PREDICTION_BEHIND, inside_prediction(LATENT_ATTENTION, DEEPSEEK_EXPERTS),
        inside_prediction(QUERIES_OF_A_LATENT, when="has_query_latent"),
        inside_prediction(WHOLE_QUERIES, when="has_whole_queries"),
    ),
    config=(
        *DECODER_CONFIG, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG, LatentHeads(),
        Fixed("tie_word_embeddings", False), Fixed("rope_interleave", True),
        Fixed("moe_layer_freq", 1, written=False),
        # transformers' class takes these where a config is silent
        Renamed("n_group", "num_expert_groups", 8), Renamed("topk_group", "num_groups_per_token", 4),
        Renamed("rms_norm_eps", "norm_eps", 1e-6), Renamed("intermediate_size", "dense_ffn_dim", 18432),
        Renamed("n_routed_experts", "num_experts", 256), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 2.5),
        LatentRope(default_theta=10_000.0), LeadingDenseLayers(default=3),
        PredictionBehind(),
        # of balancing losses, and of how released programs were started
        Unused(("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp")),
    ),
    structure={**DEEPSEEK_ROUTER, "attention_pattern": "G", "sliding_window_tokens": 0,
               "rope_on_global": True, "tied_embeddings": False, "qkv_bias": False, "qk_norm": False},
    varies=("latent_attention", "mtp_experts", *EXPERT_GROUPS),
    training={"router_bias_update_rate": 1e-3, "mtp_loss_coeff": 0.1},
    needs_shared_expert=True,
    copies=COPIES_BEHIND,
)



