"""The built-in families, each a declaration: dense ones first, then those with a mixture of experts.
`get(name)` finds them, and those of packages, by the `model_type` that transformers has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.plugins.loading import LoadedPlugin, PluginCode
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.family import (
    COMMON_CONFIG, DECODER_CONFIG, DEEPSEEK_ROUTER, DEEPSEEK_ROUTER_CONFIG, EXPERT_GROUPS, EXPERTS_CONFIG,
    KV_HEADS, Family)
from megatron_sov.model.families.hf_config import (
    AttentionScale, ConfigItem, EmbeddingsByWidth, Fixed, GemmaLayers, LogitsSoftCap, Renamed, Rope,
    TwoThetas, Unused, hidden_over_heads)
from megatron_sov.model.families.hf_layers import (
    HfPredictionLayer, LeadingDenseLayers, NormsBehind, RotatingWindows, SlidingLayers, SlidingSwitch,
    SparseSteps, SwigluLimits)
from megatron_sov.model.families.latent import DEEPSEEK_V3
from megatron_sov.model.families.linear_layers import GATE_BESIDE, KIMI_DELTA, SolarLayers
from megatron_sov.model.families.weights import (
    ATTENTION, DEEPSEEK_EXPERTS, DENSE_FFN, EMBEDDINGS_AND_HEAD, PROJECTIONS, QK_NORM, QKV_BIAS,
    ROUTED_EXPERTS, SHARED_EXPERTS, SWIGLU, Same, norms_behind, prediction_layer, router_bias, trunk)

_DECODER: tuple[ConfigItem, ...] = (
    *DECODER_CONFIG, Renamed("intermediate_size", "dense_ffn_dim"), Rope(default_theta=10_000.0),
    Renamed("tie_word_embeddings", "tied_embeddings", False))
_HEAD_DIM = Renamed("head_dim", "head_dim", hidden_over_heads)
_STRUCTURE: dict[str, Any] = {"rope_on_global": True, "num_mtp_layers": 0}
_DENSE: dict[str, Any] = {**_STRUCTURE, "num_experts": 0, "num_dense_layers": 0}
_PLAIN_DENSE: dict[str, Any] = {**_DENSE, "qkv_bias": False, "qk_norm": False}


# Llama 2 and 3 (`llama`), and what has its shape: a pre-norm decoder with RoPE in every layer, no biases.
#
# Llama 3.1's scaling of frequencies is `model.llama3_rope`.  A multi-token prediction layer, as HyperCLOVA X
# 8B Omni has one, is carried as K-EXAONE's is; transformers drops its tensors on loading.

LLAMA = Family(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             *prediction_layer(ATTENTION, DENSE_FFN)),
    config=(
        *_DECODER, _HEAD_DIM, Renamed("rms_norm_eps", "norm_eps", 1e-6),
        # transformers' default; Llama 1 came before there were others
        Renamed("num_key_value_heads", "num_kv_heads", lambda config: config["num_attention_heads"]),
        Fixed("attention_bias", False), Fixed("mlp_bias", False), HfPredictionLayer(said_without=False),
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
        *_DECODER, _HEAD_DIM, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-5), RotatingWindows(),
        Fixed("reorder_qk_norm", True, written=False),  # what released configs call norms behind
        Unused(("max_window_layers",)),
    ),
    structure={"block_norms": "post", "qk_norm": True, "qkv_bias": False, "num_experts": 0,
               "num_dense_layers": 0, "num_mtp_layers": 0},
)


# Gemma 3 (`gemma3_text`), the text models of all sizes: norms by 1 + weight before and behind each block,
# QK-norm, GELU, embeddings times the root of the width, five sliding layers before each global one, which
# turn faster than it.
#
# From 4B on they stand inside folders of vision models (`text_inside.py`), and divide the positions of
# global layers.  A cap on the products of queries and keys is refused: transformers' class reads the field
# and does not compute it.

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
        Fixed("attn_logit_softcapping", None), LogitsSoftCap(),
        Fixed("use_bidirectional_attention", False), AttentionScale("query_pre_attn_scalar", scalar=256),
        EmbeddingsByWidth(), TwoThetas(), GemmaLayers(),
        Unused(("cache_implementation", "_sliding_window_pattern")),  # transformers writes the latter
    ),
    structure={"block_norms": "both", "zero_centered_norms": True, "activation": "gelu_tanh", "qk_norm": True,
               "qkv_bias": False, "rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "num_mtp_layers": 0},
    varies=("attention_multiplier", "embedding_multiplier", "local_rope_theta", "logits_softcap"),
)


# HyperCLOVA X (`hyperclovax`): Llama's decoder with the factors of maximal update parametrisation (arXiv
# 2203.03466) and, where `use_post_norm` says so, a norm behind each block as well as before it (Peri-LN,
# arXiv 2502.02732).
#
# `use_post_norm` must be said: transformers assumes true where it is absent, the authors' own class and
# vLLM's false.

HYPERCLOVAX = Family(
    name="hyperclovax",
    hf_classes=("HyperCLOVAXForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             trunk("layers with norms behind", norms_behind("post_norm1", "post_norm2"))),
    config=(
        *_DECODER, _HEAD_DIM, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Fixed("attention_bias", False), Fixed("mlp_bias", False), NormsBehind("use_post_norm"),
        AttentionScale("attention_multiplier"),
        Renamed("embedding_multiplier", "embedding_multiplier", 1.0),
        Renamed("residual_multiplier", "residual_multiplier", 1.0),
        Renamed("logits_scaling", "logits_multiplier", 1.0),
        *(Fixed(name, 0.0, written=False) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
        Fixed("logit_scale", 1.0, written=False),  # vLLM multiplies by it, transformers does not
        Unused(("pretraining_tp", "end_token_id", "summary_first_dropout")),
    ),
    structure={**_PLAIN_DENSE, "attention_pattern": "G", "sliding_window_tokens": 0},
    varies=("block_norms", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
            "logits_multiplier"),
)


# Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`) and Qwen3-MoE (`qwen3_moe`): pre-norm decoders with RoPE in
# every layer.
#
# Qwen2 has biases on query, key and value; Qwen3 has none, and normalises each head of query and key.
# Qwen3-MoE's router takes a softmax over all experts, has no selection bias and no shared expert.
# transformers computes its logits in the model's dtype, we in fp32; they are the same for fp32 models.

_CONFIG: tuple[ConfigItem, ...] = (*_DECODER, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-6))

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""PRETOKENIZE_REGEX of transformers 5.24's tokenization_qwen2.py, whose class reads every folder
of model type qwen2."""

QWEN2 = Family(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, QKV_BIAS, DENSE_FFN)),
    config=(*_CONFIG, SlidingSwitch(by_layer=True), _HEAD_DIM,
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


# K-EXAONE (`exaone_moe`): sliding layers with RoPE, global layers without (NoPE), QK-norm, leading dense
# layers, one MTP layer. Its 2.0 has windows of two sizes, a bound on the gates of late layers, and applies
# its MTP layer four times.
#
# transformers' attention rotates only layers of type sliding_attention; there is no config field for it. Its
# model drops the `mtp.*` tensors on loading; inference engines read them for self-speculative decoding. The
# prediction layer is dense, and attends globally without RoPE unless `mtp_layer_types` says otherwise
# (TensorRT-LLM, `modeling_exaone_moe.py`: "A MTP layer uses the global attention"; the released config:
# `mtp_layer_types: ["full_attention"]`).

EXAONE_MOE = Family(
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
        HfPredictionLayer(), SwigluLimits(),
    ),
    structure={**DEEPSEEK_ROUTER, "rope_on_global": False, "qkv_bias": False, "qk_norm": True,
               "tied_embeddings": False},
    training={"router_bias_update_rate": 1e-4},
    varies=(*EXPERT_GROUPS, "layer_windows", "swiglu_limits", "mtp_depths"),
    needs_shared_expert=True,
)


# Solar Open (`solar_open`): mixture of experts in every layer, global attention with RoPE, no QK-norm.

SOLAR_OPEN = Family(
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


# Solar Open 2 (`solar_open2`): three layers of four have Kimi Delta Attention with rates up to 2, the others
# softmax attention with a gate of a matrix of its own; no positions; Solar Open's experts in every layer.
#
# Rotations, hyper-connections, biases and whole gates are switches of its class that no released model has.

SOLAR_OPEN2 = Family(
    name="solar_open2",
    hf_classes=("SolarOpen2ForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD, trunk("linear layers", KIMI_DELTA), trunk("other layers", GATE_BESIDE),
        trunk("other layers", QK_NORM, when="qk_norm"),
        trunk("dense layers", DENSE_FFN), trunk("moe layers", DEEPSEEK_EXPERTS),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG,
        Fixed("tie_word_embeddings", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5), Renamed("head_dim", "head_dim", 128),
        Renamed("n_routed_experts", "num_experts", 320, aliases=("num_local_experts",)),
        Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0),
        Renamed("intermediate_size", "dense_ffn_dim", 10240),
        Renamed("first_k_dense_replace", "num_dense_layers", 0), Renamed("use_qk_norm", "qk_norm", False),
        SolarLayers(), Fixed("use_rope", False), Fixed("use_gqa_gate", True),
        Fixed("use_gqa_gate_bias", False), Fixed("kda_use_full_proj", False),
        Fixed("hc_rate", 0, written=False), Fixed("num_nextn_predict_layers", 0, written=False),
        # nothing rotates, and no program bounds decays
        Unused(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
                "kda_gate_lower_bound")),
    ),
    structure={**DEEPSEEK_ROUTER, "attention_output_gate": True, "sliding_window_tokens": 0,
               "rope_on_global": False, "rope_theta": 10_000.0, "yarn": None, "llama3_rope": None,
               "linear_rope_factor": None, "qkv_bias": False, "tied_embeddings": False, "num_mtp_layers": 0},
    varies=("linear_attention", *EXPERT_GROUPS),
    needs_shared_expert=True,
)


FAMILIES = {family.name: family for family in (
    SOLAR_OPEN, EXAONE_MOE, QWEN2, QWEN3, QWEN3_MOE, LLAMA, EXAONE4, HYPERCLOVAX, GEMMA3, DEEPSEEK_V3,
    SOLAR_OPEN2)}


def get(name: str, recorded: Sequence[PluginCode] = ()) -> Family:
    """Return the family of that name: built in, declared by an installed package,
    or named on the command line.

    Args:
        name: as `model.family` and transformers' `model_type` have it.
        recorded: what a config or checkpoint says about its code, for the message alone.

    Raises:
        UserError: there is none; the message names the nearest and lists all.
    """
    return FAMILIES[name] if name in FAMILIES else OWN.get(name, recorded)


def _check(loaded: LoadedPlugin) -> None:
    family = loaded.value
    if not isinstance(family, Family):
        raise UserError(f"{loaded.reference}: is a {type(family).__name__}; a model family is a "
                        "megatron_sov.model.families.family.Family")
    if not family.name.isidentifier():
        raise UserError(f"{loaded.reference}: is called {family.name!r}; "
                        "its name must be transformers' model_type, of letters, digits and _")
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    unknown = [f"{name!r}{suggest_name(name, fields)}" for name in (*family.structure, *family.training)
               if name not in fields]
    if unknown:
        raise UserError(f"{loaded.reference}: structure and training hold settings of the model, "
                        f"which has no {', '.join(unknown)}")
    if unsaid := family.unsaid():
        raise UserError(f"{loaded.reference}: says nothing of model.{', model.'.join(unsaid)}, and readers "
                        "of its config.json would take transformers' default; add an item for each to config "
                        "(as KV_HEADS for num_kv_heads), or the field to structure")


OWN: Registry[Family] = Registry("model family", FAMILIES, _check, lambda family: family.name)
"""Families that are not built in."""
