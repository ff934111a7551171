"""Gemma 2 (`gemma2`), 2B, 9B and 27B: norms by 1 + weight before and behind each block, GELU, embeddings
times the root of the width, every other layer slides, soft caps on the products of queries and keys and on
the head's logits."""

from __future__ import annotations

from megatron_sov.models.family import COMMON_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import (
    AttentionScale,
    EmbeddingsByWidth,
    Fixed,
    PeriodicLayers,
    Renamed,
    Rope,
    SoftCap,
    Unused,
)
from megatron_sov.models.weights import ATTENTION, EMBEDDINGS_AND_HEAD, SWIGLU, Same, norms_behind, trunk

FAMILY = Family(
    name="gemma2",
    hf_classes=("Gemma2ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk(
        "every layer", ATTENTION,
        (Same("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", "H"),), SWIGLU,
        norms_behind("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *COMMON_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", 256),
        Renamed("tie_word_embeddings", "tied_embeddings", True), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Fixed("hidden_activation", "gelu_pytorch_tanh"),
        Fixed("hidden_act", "gelu_pytorch_tanh", written=False),  # beside the other in released configs
        Fixed("attention_bias", False), Fixed("use_bidirectional_attention", False),
        SoftCap("attn_logit_softcapping", "attention_softcap", 50.0),
        SoftCap("final_logit_softcapping", "logits_softcap", 30.0),
        AttentionScale("query_pre_attn_scalar", scalar=256),
        EmbeddingsByWidth(), Rope(default_theta=10_000.0),
        PeriodicLayers(2, ("layer_types", "sliding_window", "sliding_window_size")),
        Unused(("cache_implementation",)),
    ),
    structure={"block_norms": "both", "zero_centered_norms": True, "activation": "gelu_tanh",
               "qk_norm": False, "qkv_bias": False, "rope_on_global": True, "num_experts": 0,
               "num_dense_layers": 0, "num_mtp_layers": 0},
    varies=("attention_multiplier", "embedding_multiplier", "attention_softcap", "logits_softcap"),
)
