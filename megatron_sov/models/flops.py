"""Floating point operations that training needs, from a model's config alone.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): 6 for each weight that a token is multiplied with (2 in
the forward pass, 4 in the backward pass), and 12 x heads x head size for each key that a query sees.  Of
experts those that a token is routed to count, of attention the causal half and no more than the window, as
Megatron-LM counts (a sample is taken for one document, which overstates samples of many).  Looking up an
embedding, norms and softmax are no matrix products; what is recomputed counts once.
"""

from __future__ import annotations

from megatron_sov.config import ModelConfig
from megatron_sov.models.count import swiglu_params

PER_WEIGHT = 6
"""A multiplication and an addition, forward and for each of the two gradients."""


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of forward and backward pass of a token, the mean over a row of `seq_len`."""
    keys = [mean_keys(seq_len, model.window_tokens(kind)) for kind in model.layer_types()]
    keys += [mean_keys(seq_len, model.window_tokens(model.mtp_layer_type()))] * model.num_mtp_layers
    latent = model.latent_attention
    # of a query and a key: their product, and the value's
    widths = model.head_dim + (model.head_dim if latent is None else latent.v_head_dim)
    return PER_WEIGHT * (multiplied_weights(model) + model.num_heads * widths * sum(keys))


def multiplied_weights(model: ModelConfig) -> int:
    """Return the weights that a token is multiplied with: of projections, feed-forward networks, routers
    and heads."""
    h, depths = model.hidden_size, 1 + model.num_mtp_layers
    latent = model.latent_attention
    if latent is None:
        attention = 2 * h * model.head_dim * (model.num_heads + model.num_kv_heads)
    else:
        norms = latent.kv_lora_rank + (latent.q_lora_rank or 0)
        attention = latent.num_params(h, model.num_heads) - norms
    dense = swiglu_params(h, model.dense_ffn_dim)
    experts = (h * model.num_experts + (model.num_experts_per_token + model.num_shared_experts)
               * swiglu_params(h, model.expert_ffn_dim))
    num_moe_layers = model.num_moe_layers()
    return (model.num_layers * attention + (model.num_layers - num_moe_layers) * dense
            + num_moe_layers * experts + depths * model.vocab_size * h
            + model.num_mtp_layers * (2 * h * h + attention + (experts if model.mtp_experts else dense)))


def mean_keys(seq_len: int, window: int) -> float:
    """Return how many keys a query sees, itself included, the mean over a causal row.

    Args:
        seq_len: tokens of the row.
        window: keys that a query sees at most; 0: all before it.
    """
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
