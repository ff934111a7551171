"""Built-in model families, dense families first. `get_family(name)` finds them and plug-ins by
`model_type`."""

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
    AttentionScale, ConfigItem, Fixed, GemmaLayers, LogitsSoftCap, Renamed, Rope, ScaledEmbeddings, TwoThetas,
    Unused, hidden_over_heads)
from megatron_sov.model.families.hf_layers import (
    HfPredictionLayer, LeadingDenseLayers, OutputNormSwitch, RotatingWindows, SlidingLayers, SlidingSwitch,
    SparseSteps, SwigluLimits)
from megatron_sov.model.families.latent import DEEPSEEK_V3
from megatron_sov.model.families.linear_layers import GATED_ATTENTION, KIMI_DELTA, SolarLayers
from megatron_sov.model.families.weights import (
    ATTENTION, DEEPSEEK_EXPERTS, DENSE_FFN, EMBEDDINGS_AND_HEAD, PROJECTIONS, QK_NORM, QKV_BIAS,
    ROUTED_EXPERTS, SHARED_EXPERTS, SWIGLU, Same, output_norms, prediction_sections, router_bias_entry,
    trunk_section)

_DECODER: tuple[ConfigItem, ...] = (
    *DECODER_CONFIG, Renamed("intermediate_size", "dense_ffn_dim"), Rope(default_theta=10_000.0),
    Renamed("tie_word_embeddings", "tied_embeddings", False))
_HEAD_DIM = Renamed("head_dim", "head_dim", hidden_over_heads)
_STRUCTURE: dict[str, Any] = {"rope_on_global": True, "num_mtp_layers": 0}
_DENSE: dict[str, Any] = {**_STRUCTURE, "num_experts": 0, "num_dense_layers": 0}
_PLAIN_DENSE: dict[str, Any] = {**_DENSE, "qkv_bias": False, "qk_norm": False}


# Llama 2, 3 and compatible models (`llama`): pre-norm decoder, RoPE in every layer, no biases. Llama 3.1's
# RoPE scaling is `model.llama3_rope`. A multi-token prediction layer (HyperCLOVA X 8B Omni) has K-EXAONE's
# tensor names; transformers drops its tensors on loading.

LLAMA = Family(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, DENSE_FFN),
             *prediction_sections(ATTENTION, DENSE_FFN)),
    config=(
        *_DECODER, _HEAD_DIM, Renamed("rms_norm_eps", "norm_eps", 1e-6),
        # Default in transformers; Llama 1 had no grouped-query attention.
        Renamed("num_key_value_heads", "num_kv_heads", lambda config: config["num_attention_heads"]),
        Fixed("attention_bias", False), Fixed("mlp_bias", False), HfPredictionLayer(writes_zero=False),
        Unused(("pretraining_tp",)),  # tensor parallel size of the authors' pretraining
    ),
    structure={"rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False, "attention_pattern": "G", "sliding_window_tokens": 0},
)


# EXAONE 4.0 (`exaone4`): norms after blocks instead of before; QK-norm. In the 32B, three of four layers have
# sliding windows with RoPE, and the fourth has global attention without positions; in the 1.2B, all layers
# have global attention with RoPE.

EXAONE4 = Family(
    name="exaone4",
    hf_classes=("Exaone4ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section(
        "every layer", PROJECTIONS, QK_NORM, SWIGLU,
        output_norms("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *_DECODER, _HEAD_DIM, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-5), RotatingWindows(),
        Fixed("reorder_qk_norm", True, written=False),  # released configs: norms after blocks
        Unused(("max_window_layers",)),
    ),
    structure={"block_norms": "post", "qk_norm": True, "qkv_bias": False, "num_experts": 0,
               "num_dense_layers": 0, "num_mtp_layers": 0},
)


# Gemma 3 (`gemma3_text`), text models of all sizes: norms with 1 + weight before and after blocks, QK-norm,
# GELU, embeddings times sqrt(hidden_size), five sliding layers per global layer, with a smaller RoPE base.
# Models from 4B on are nested in multimodal folders and scale RoPE in global layers. A soft cap on attention
# scores is rejected: transformers' class reads the field without applying the cap.

GEMMA3 = Family(
    name="gemma3_text",
    hf_classes=("Gemma3ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section(
        "every layer", ATTENTION, QK_NORM,
        (Same("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", "H"),), SWIGLU,
        output_norms("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *COMMON_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", 256),
        Renamed("tie_word_embeddings", "tied_embeddings", True), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Fixed("hidden_activation", "gelu_pytorch_tanh"), Fixed("attention_bias", False),
        Fixed("attn_logit_softcapping", None), LogitsSoftCap(),
        Fixed("use_bidirectional_attention", False), AttentionScale("query_pre_attn_scalar", scalar=256),
        ScaledEmbeddings(), TwoThetas(), GemmaLayers(),
        Unused(("cache_implementation", "_sliding_window_pattern")),  # transformers writes the latter
    ),
    structure={"block_norms": "both", "zero_centered_norms": True, "activation": "gelu_tanh", "qk_norm": True,
               "qkv_bias": False, "rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "num_mtp_layers": 0},
    varies=("attention_multiplier", "embedding_multiplier", "local_rope_theta", "logits_softcap"),
)


# HyperCLOVA X (`hyperclovax`): Llama's decoder with multipliers of maximal update parametrisation (arXiv
# 2203.03466) and, with `use_post_norm`, norms before and after blocks (Peri-LN, arXiv 2502.02732).
# `use_post_norm` is required: its default is true in transformers, false in the authors' class and in vLLM.

HYPERCLOVAX = Family(
    name="hyperclovax",
    hf_classes=("HyperCLOVAXForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, DENSE_FFN),
             trunk_section("layers with norms behind", output_norms("post_norm1", "post_norm2"))),
    config=(
        *_DECODER, _HEAD_DIM, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Fixed("attention_bias", False), Fixed("mlp_bias", False), OutputNormSwitch("use_post_norm"),
        AttentionScale("attention_multiplier"),
        Renamed("embedding_multiplier", "embedding_multiplier", 1.0),
        Renamed("residual_multiplier", "residual_multiplier", 1.0),
        Renamed("logits_scaling", "logits_multiplier", 1.0),
        *(Fixed(name, 0.0, written=False) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
        Fixed("logit_scale", 1.0, written=False),  # applied by vLLM, not by transformers
        Unused(("pretraining_tp", "end_token_id", "summary_first_dropout")),
    ),
    structure={**_PLAIN_DENSE, "attention_pattern": "G", "sliding_window_tokens": 0},
    varies=("block_norms", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
            "logits_multiplier"),
)


# Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`), Qwen3-MoE (`qwen3_moe`): pre-norm decoders, RoPE in every
# layer. Qwen2 has biases on query, key and value; Qwen3 has QK-norm instead. Qwen3-MoE has a softmax router
# without selection bias, and no shared expert. Router logits are in fp32 here, in the model's dtype in
# transformers; fp32 models agree.

_CONFIG: tuple[ConfigItem, ...] = (*_DECODER, KV_HEADS, Renamed("rms_norm_eps", "norm_eps", 1e-6))

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""PRETOKENIZE_REGEX in tokenization_qwen2.py of transformers 5.24, which its class applies to every qwen2
folder."""

QWEN2 = Family(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, QKV_BIAS, DENSE_FFN)),
    config=(*_CONFIG, SlidingSwitch(by_layer=True), _HEAD_DIM,
            Fixed("use_mrope", False, written=False)),  # present in Qwen2.5 configs
    structure={**_DENSE, "qkv_bias": True, "qk_norm": False},
    reader_split=QWEN2_SPLIT,
)

QWEN3 = Family(
    name="qwen3", hf_classes=("Qwen3ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, QK_NORM, DENSE_FFN)),
    config=(*_CONFIG, SlidingSwitch(by_layer=True), Renamed("head_dim", "head_dim", 128),
            Fixed("attention_bias", False)),
    structure={**_DENSE, "qkv_bias": False, "qk_norm": True})

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk_section("every layer", ATTENTION, QK_NORM),
        trunk_section("dense layers", DENSE_FFN),
        trunk_section("moe layers", ROUTED_EXPERTS),
    ),
    config=(
        *_CONFIG, *EXPERTS_CONFIG, SlidingSwitch(by_layer=False), SparseSteps(),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        # transformers writes the second name
        Renamed("num_experts", "num_experts", 128, aliases=("num_local_experts",)),
        Renamed("norm_topk_prob", "norm_topk_prob", False),
        # Loss weight in transformers' class; `model.seq_aux_loss_coeff` sets the trainer's.
        Unused(("router_aux_loss_coef",)),
    ),
    structure={**_STRUCTURE, "qkv_bias": False, "qk_norm": True, "num_shared_experts": 0,
               "router_score": "softmax", "router_bias": False, "routed_scaling_factor": 1.0},
    training={"seq_aux_loss_coeff": 1e-3},
)


# K-EXAONE (`exaone_moe`): sliding layers with RoPE, global layers without (NoPE), QK-norm, leading dense
# layers, an MTP layer. K-EXAONE 2.0 has windows of two sizes, SwiGLU clamps in late layers, and applies the
# MTP layer four times. transformers applies RoPE only in sliding layers, without a config field, and drops
# `mtp.*` tensors on loading; inference engines read them for self-speculative decoding. The prediction layer
# is dense, with global attention and without RoPE unless `mtp_layer_types` differs (TensorRT-LLM,
# `modeling_exaone_moe.py`: "A MTP layer uses the global attention"; released config:
# `mtp_layer_types: ["full_attention"]`).

EXAONE_MOE = Family(
    name="exaone_moe",
    # The second class name is in configs from before transformers had the family.
    hf_classes=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk_section("every layer", ATTENTION, QK_NORM),
        trunk_section("dense layers", DENSE_FFN),
        trunk_section("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS,
                      (router_bias_entry("mlp.e_score_correction_bias"),)),
        *prediction_sections(ATTENTION, QK_NORM, DENSE_FFN),
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
        trunk_section("every layer", ATTENTION),
        trunk_section("moe layers", DEEPSEEK_EXPERTS),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *EXPERTS_CONFIG, *DEEPSEEK_ROUTER_CONFIG,
        Fixed("tie_word_embeddings", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5), Renamed("head_dim", "head_dim", 128),
        Renamed("n_routed_experts", "num_experts", 128), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0), Rope(default_theta=1e6),
        # transformers stores and ignores the fields, so other values would silently give another model.
        Fixed("first_k_dense_replace", 0, written=False), Fixed("use_qk_norm", False, written=False),
        Fixed("partial_rotary_factor", 1.0, written=False),
        Fixed("num_nextn_predict_layers", 0, written=False),
        Unused(("intermediate_size",)),  # in the published config, although no layer is dense
    ),
    structure={**DEEPSEEK_ROUTER, "num_dense_layers": 0, "dense_ffn_dim": 0, "attention_pattern": "G",
               "sliding_window_tokens": 0, "rope_on_global": True, "qkv_bias": False, "qk_norm": False,
               "tied_embeddings": False, "num_mtp_layers": 0},
    varies=EXPERT_GROUPS,
    needs_shared_expert=True,
)


# Solar Open 2 (`solar_open2`): three of four layers have Kimi Delta Attention with learning rates up to 2,
# the fourth has softmax attention with output gates; no positions; Solar Open's experts in every layer.
# RoPE, hyper-connections, biases and full-rank gates are switches that no released model uses.

SOLAR_OPEN2 = Family(
    name="solar_open2",
    hf_classes=("SolarOpen2ForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD, trunk_section("linear layers", KIMI_DELTA),
        trunk_section("other layers", GATED_ATTENTION),
        trunk_section("other layers", QK_NORM, when="qk_norm"),
        trunk_section("dense layers", DENSE_FFN), trunk_section("moe layers", DEEPSEEK_EXPERTS),
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
        # No layer uses RoPE, and no program applies the bound on decays.
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


def get_family(name: str, recorded: Sequence[PluginCode] = ()) -> Family:
    """Return the family called `name`: built-in, from an installed package, or from `--plugin`.

    Args:
        name: `model.family`, equal to transformers' `model_type`.
        recorded: code recorded in a config or checkpoint, for the error message.

    Raises:
        UserError: unknown family; the message names the nearest family and lists all.
    """
    return FAMILIES[name] if name in FAMILIES else FAMILY_PLUGINS.get(name, recorded)


def _check_family(loaded: LoadedPlugin) -> None:
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
        raise UserError(f"{loaded.reference}: structure and training name unknown settings of the model: "
                        f"{', '.join(unknown)}")
    if undefined := family.find_undefined_fields():
        raise UserError(f"{loaded.reference}: does not define model.{', model.'.join(undefined)}, so readers "
                        "of config.json would use transformers' default; add an item to config (like "
                        "KV_HEADS for num_kv_heads), or the field to structure")


FAMILY_PLUGINS: Registry[Family] = Registry("model family", FAMILIES, _check_family,
                                            lambda family: family.name)
"""Families from plug-ins."""
