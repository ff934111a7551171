"""How many parameters a model has, from its config alone.

The sums are the shapes of the weights as they are published; a tied output head is the embedding matrix and
counts once.  The router's selection bias is a buffer that no gradient reaches, so it is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.config import ModelConfig
from megatron_sov.models.encoders import encoder_params


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model; `total` and `active` leave out the multi-token prediction layers and
    encoders, as published figures do."""

    total: int
    """Parameters of the trunk, embeddings and output head included."""
    active: int
    """Parameters of the trunk that one token meets: `total` without the experts that it is not routed to."""
    mtp: int
    """Parameters of the multi-token prediction layers (0 where there are none), all experts included;
    embeddings and head are the trunk's."""
    encoders: int = 0
    """Parameters of encoders of pictures and sounds, of their adapters and compressor."""


def attention_params(model: ModelConfig) -> int:
    """Return the weights of one attention block: query, key, value, output and, where it has them,
    biases, QK-norms and sinks; of latent attention its norms."""
    if model.latent_attention is not None:
        return model.latent_attention.num_params(model.hidden_size, model.num_heads)
    projections = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    bias = model.head_dim * (model.num_heads + 2 * model.num_kv_heads) if model.qkv_bias else 0
    further = model.linear_bias * model.hidden_size + model.attention_sinks * model.num_heads
    return projections + bias + further + (2 * model.head_dim if model.qk_norm else 0)


def swiglu_params(hidden_size: int, ffn_dim: int, *, bias: bool = False) -> int:
    """Return the weights of one SwiGLU feed-forward network: gate, up and down."""
    return 3 * hidden_size * ffn_dim + (2 * ffn_dim + hidden_size if bias else 0)


def num_params(model: ModelConfig) -> ParamCount:
    """Return the parameter counts of `model`.

    A multi-token prediction layer has the form of DeepSeek-V3 (arXiv 2412.19437, section 2.2): two norms, a
    projection from 2H to H, one transformer layer, dense or with experts, and a last norm.
    """
    h = model.hidden_size
    num_moe_layers = model.num_moe_layers()
    num_dense_layers = model.num_layers - num_moe_layers
    block = attention_params(model) + model.norms_per_layer() * h
    dense_ffn, expert = (swiglu_params(h, width, bias=model.linear_bias)
                         for width in (model.dense_ffn_dim, model.expert_ffn_dim))
    router = (h + model.linear_bias) * model.num_experts
    moe_ffn = router + (model.num_experts + model.num_shared_experts) * expert
    embeddings_and_head = (1 if model.tied_embeddings else 2) * model.vocab_size * h

    total = (embeddings_and_head + h + model.num_layers * block + num_dense_layers * dense_ffn
             + num_moe_layers * moe_ffn)
    idle = num_moe_layers * (model.num_experts - model.num_experts_per_token) * expert
    mtp = model.num_mtp_layers * (
        2 * h + 2 * h * h + block + (moe_ffn if model.mtp_experts else dense_ffn) + h)
    return ParamCount(total, total - idle, mtp, encoder_params(model))
