"""Families whose layers are dense, and Qwen's, which have both kinds."""

from __future__ import annotations

from typing import Any

from megatron_sov.model.families.family import COMMON_CONFIG, DECODER_CONFIG, EXPERTS_CONFIG, KV_HEADS, Family
from megatron_sov.model.families.hf_config import (
    AttentionScale, ConfigItem, EmbeddingsByWidth, Fixed, PeriodicLayers, Renamed, Rope, SoftCap, TwoThetas,
    Unused, hidden_over_heads)
from megatron_sov.model.families.hf_layers import (
    HfPredictionLayer, NormsBehind, RotatingWindows, SlidingSwitch, SparseSteps)
from megatron_sov.model.families.weights import (
    ATTENTION, DENSE_FFN, EMBEDDINGS_AND_HEAD, PROJECTIONS, QK_NORM, QKV_BIAS, ROUTED_EXPERTS, SWIGLU, Same,
    norms_behind, prediction_layer, trunk)

# Llama 2 and 3 (`llama`), and what has its shape: a pre-norm decoder with RoPE in every layer, no biases.
#
# Llama 3.1's scaling of frequencies is `model.llama3_rope`.  A multi-token prediction layer, as HyperCLOVA
# X 8B
# Omni has one, is carried as K-EXAONE's is; transformers drops its tensors on loading.

LLAMA = Family(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             *prediction_layer(ATTENTION, DENSE_FFN)),
    config=(
        *DECODER_CONFIG, Renamed("intermediate_size", "dense_ffn_dim"),
        # transformers' default; Llama 1 came before there were others
        Renamed("num_key_value_heads", "num_kv_heads", lambda config: config["num_attention_heads"]),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Rope(default_theta=10_000.0), Fixed("attention_bias", False), Fixed("mlp_bias", False),
        HfPredictionLayer(said_without=False),
        Unused(("pretraining_tp",)),  # how its authors cut a product in pretraining
    ),
    structure={"rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False, "attention_pattern": "G", "sliding_window_tokens": 0},
)


# EXAONE 4.0 (`exaone4`): blocks are normalised behind, not before; QK-norm.
#
# The 32B slides with RoPE in three layers of four and attends globally without positions in the fourth; the
# 1.2B is global with RoPE throughout.

EXAONE4 = Family(
    name="exaone4",
    hf_classes=("Exaone4ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk(
        "every layer", PROJECTIONS, QK_NORM, SWIGLU,
        norms_behind("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Rope(default_theta=10_000.0), RotatingWindows(),
        Fixed("reorder_qk_norm", True, written=False),  # what released configs call norms behind
        Unused(("max_window_layers",)),
    ),
    structure={"block_norms": "post", "qk_norm": True, "qkv_bias": False, "num_experts": 0,
               "num_dense_layers": 0, "num_mtp_layers": 0},
)


# Gemma 2 (`gemma2`), 2B, 9B and 27B: norms by 1 + weight before and behind each block, GELU, embeddings
# times the root of the width, every other layer slides, soft caps on the products of queries and keys and
# on
# the head's logits.

GEMMA2 = Family(
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


# Gemma 3 (`gemma3_text`), the text models of all sizes: norms by 1 + weight before and behind each block,
# QK-norm, GELU, embeddings times the root of the width, five sliding layers before each global one, which
# turn
# faster than it.
#
# From 4B on they stand inside folders of vision models (`text_inside.py`), and divide the positions of
# global
# layers.  A cap on the products of queries and keys is refused: transformers' class reads the field and
# does
# not compute it.

GEMMA3 = Family(
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


# HyperCLOVA X (`hyperclovax`): Llama's decoder with the factors of maximal update parametrisation
# (arXiv 2203.03466) and, where `use_post_norm` says so, a norm behind each block as well as before it
# (Peri-LN, arXiv 2502.02732).
#
# `use_post_norm` must be said: transformers assumes true where it is absent, the authors' own class and
# vLLM's
# false.

HYPERCLOVAX = Family(
    name="hyperclovax",
    hf_classes=("HyperCLOVAXForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             trunk("layers with norms behind", norms_behind("post_norm1", "post_norm2"))),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Rope(default_theta=10_000.0), Fixed("attention_bias", False), Fixed("mlp_bias", False),
        NormsBehind("use_post_norm"), AttentionScale("attention_multiplier"),
        Renamed("embedding_multiplier", "embedding_multiplier", 1.0),
        Renamed("residual_multiplier", "residual_multiplier", 1.0),
        Renamed("logits_scaling", "logits_multiplier", 1.0),
        *(Fixed(name, 0.0, written=False) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
        Fixed("logit_scale", 1.0, written=False),  # vLLM multiplies by it, transformers does not
        Unused(("pretraining_tp", "end_token_id", "summary_first_dropout")),
    ),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False, "attention_pattern": "G", "sliding_window_tokens": 0},
    varies=("block_norms", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
            "logits_multiplier"),
)


# Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`) and Qwen3-MoE (`qwen3_moe`):
# pre-norm decoders with RoPE in every layer.
#
# Qwen2 has biases on query, key and value; Qwen3 has none, and normalises each head of query and key.
# Qwen3-MoE's router takes a softmax over all experts, has no selection bias and no shared expert.
# transformers
# computes its logits in the model's dtype, we in fp32; they are the same for fp32 models.

_CONFIG: tuple[ConfigItem, ...] = (
    *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
    Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
    Rope(default_theta=10_000.0),
)
_STRUCTURE: dict[str, Any] = {"rope_on_global": True, "num_mtp_layers": 0}
_DENSE: dict[str, Any] = {**_STRUCTURE, "num_experts": 0, "num_dense_layers": 0}

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""PRETOKENIZE_REGEX of transformers 5.23's tokenization_qwen2.py, whose class reads every folder
of model type qwen2."""

QWEN2 = Family(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, QKV_BIAS, DENSE_FFN)),
    config=(*_CONFIG, SlidingSwitch(by_layer=True), Renamed("head_dim", "head_dim", hidden_over_heads),
            Fixed("use_mrope", False, written=False)),  # configs of Qwen2.5 say so
    structure={**_DENSE, "qkv_bias": True, "qk_norm": False},
    reader_split=QWEN2_SPLIT,
)

QWEN3 = Family(
    name="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, QK_NORM, DENSE_FFN)),
    config=(*_CONFIG, SlidingSwitch(by_layer=True), Renamed("head_dim", "head_dim", 128),
            Fixed("attention_bias", False)),
    structure={**_DENSE, "qkv_bias": False, "qk_norm": True},
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk("every layer", ATTENTION, QK_NORM),
        trunk("dense layers", DENSE_FFN),
        trunk("moe layers", ROUTED_EXPERTS),
    ),
    config=(
        *_CONFIG, *EXPERTS_CONFIG, SlidingSwitch(by_layer=False), SparseSteps(),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        # transformers writes the second name
        Renamed("num_experts", "num_experts", 128, aliases=("num_local_experts",)),
        Renamed("norm_topk_prob", "norm_topk_prob", False),
        # of its own model class only; ours is chosen by model.seq_aux_loss_coeff
        Unused(("router_aux_loss_coef",)),
    ),
    structure={**_STRUCTURE, "qkv_bias": False, "qk_norm": True, "num_shared_experts": 0,
               "router_score": "softmax", "router_bias": False, "routed_scaling_factor": 1.0},
    training={"seq_aux_loss_coeff": 1e-3},
)
