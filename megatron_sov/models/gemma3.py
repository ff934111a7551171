"""Gemma 3 (`gemma3_text`), the text models of all sizes: norms by 1 + weight before and behind each block,
QK-norm, GELU, embeddings times the root of the width, five sliding layers before each global one, which turn
faster than it.

From 4B on they stand inside folders of vision models (`text_inside.py`), and divide the positions of global
layers.  A cap on the products of queries and keys is refused: transformers' class reads the field and does
not compute it.
"""

from __future__ import annotations

from megatron_sov.models.family import COMMON_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import (
    AttentionScale,
    EmbeddingsByWidth,
    Fixed,
    PeriodicLayers,
    Renamed,
    SoftCap,
    TwoThetas,
    Unused,
)
from megatron_sov.models.weights import (
    ATTENTION,
    EMBEDDINGS_AND_HEAD,
    QK_NORM,
    SWIGLU,
    Same,
    norms_behind,
    trunk,
)

FAMILY = Family(
    name="gemma3_text",
    hf_classes=("Gemma3ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk(
        "every layer", ATTENTION, QK_NORM,
        (Same("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", "H"),), SWIGLU,
        norms_behind("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *COMMON_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", 256),
        Renamed("tie_word_embeddings", "tied_embeddings", True), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Fixed("hidden_activation", "gelu_pytorch_tanh"), Fixed("attention_bias", False),
        Fixed("attn_logit_softcapping", None), SoftCap("final_logit_softcapping", "logits_softcap", None),
        Fixed("use_bidirectional_attention", False), AttentionScale("query_pre_attn_scalar", scalar=256),
        EmbeddingsByWidth(), TwoThetas(), PeriodicLayers(6),
        Unused(("cache_implementation", "_sliding_window_pattern")),  # transformers writes the latter
    ),
    structure={"block_norms": "both", "zero_centered_norms": True, "activation": "gelu_tanh", "qk_norm": True,
               "qkv_bias": False, "rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "num_mtp_layers": 0},
    varies=("attention_multiplier", "embedding_multiplier", "local_rope_theta", "logits_softcap"),
)
