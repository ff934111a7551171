"""DeepSeek-V3 and R1, Kimi K2 (`deepseek_v3`): multi-head latent attention, leading dense layers,
DeepSeek-V3's router and a shared expert.

The prediction layer, which has experts of its own, stands in a folder as one more layer of the trunk.
transformers drops it on loading, and so do we.
"""

from __future__ import annotations

from megatron_sov.models.blocks import (
    DENSE_FFN,
    EMBEDDINGS_AND_HEAD,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    router_bias,
    trunk,
)
from megatron_sov.models.family import (
    DECODER_CONFIG,
    DEEPSEEK_ROUTER,
    DEEPSEEK_ROUTER_CONFIG,
    EXPERTS_CONFIG,
    Family,
)
from megatron_sov.models.hf_config import Fixed, Renamed, Unused, Zero
from megatron_sov.models.hf_latent import LatentHeads, LatentRope
from megatron_sov.models.hf_layers import LeadingDenseLayers
from megatron_sov.models.latent_blocks import LATENT_ATTENTION, QUERIES_OF_A_LATENT, WHOLE_QUERIES

FAMILY = Family(
    name="deepseek_v3",
    hf_classes=("DeepseekV3ForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", LATENT_ATTENTION),
        trunk("every layer", QUERIES_OF_A_LATENT, when="has_query_latent"),
        trunk("every layer", WHOLE_QUERIES, when="has_whole_queries"),
        trunk("dense layers", DENSE_FFN),
        trunk("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS,
              (router_bias("mlp.gate.e_score_correction_bias"),)),
    ),
    config=(
        *DECODER_CONFIG, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG, LatentHeads(),
        Fixed("tie_word_embeddings", False), Fixed("rope_interleave", True),
        Fixed("moe_layer_freq", 1, written=False),
        Renamed("rms_norm_eps", "norm_eps", 1e-6), Renamed("intermediate_size", "dense_ffn_dim", 18432),
        Renamed("n_routed_experts", "num_experts", 256), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 2.5),
        LatentRope(default_theta=10_000.0), LeadingDenseLayers(default=3),
        Zero("num_nextn_predict_layers", aliases=("num_mtp_layers",)),
        # of balancing losses, and of how released programs were started
        Unused(("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp")),
    ),
    structure={**DEEPSEEK_ROUTER, "attention_pattern": "G", "sliding_window_tokens": 0,
               "rope_on_global": True, "tied_embeddings": False, "qkv_bias": False, "qk_norm": False,
               "num_mtp_layers": 0},
    varies=("latent_attention",),
    training={"router_bias_update_rate": 1e-3},
    needs_shared_expert=True,
    predicts_behind=True,
)
