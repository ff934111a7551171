"""Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`) and Qwen3-MoE (`qwen3_moe`):
pre-norm decoders with RoPE in every layer.

Qwen2 has biases on query, key and value; Qwen3 has none, and normalises each head of query and key.
Qwen3-MoE's router takes a softmax over all experts, has no selection bias and no shared expert.  transformers
computes its logits in the model's dtype, we in fp32; they are the same for fp32 models.
"""

from __future__ import annotations

from typing import Any

from megatron_sov.models.family import DECODER_CONFIG, EXPERTS_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import Fixed, Item, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.models.hf_layers import SlidingSwitch, SparseSteps
from megatron_sov.models.weights import (
    ATTENTION,
    DENSE_FFN,
    EMBEDDINGS_AND_HEAD,
    QK_NORM,
    QKV_BIAS,
    ROUTED_EXPERTS,
    trunk,
)

_CONFIG: tuple[Item, ...] = (
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
