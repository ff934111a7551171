"""How many parameters a model has and how many floating point operations its training needs, from its config
alone: sums over the weight map of its family.

A tied output head is the embedding matrix and counts once.  The router's selection bias is a buffer that no
gradient reaches, so it is not counted.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): 6 for each weight that a token is multiplied with (2 in
the forward pass, 4 in the backward pass), and 12 x heads x head size for each key that a query sees.  Of
experts those that a token is routed to count, of attention the causal half and no more than the window, as
Megatron-LM counts (a sample is taken for one document, which overstates samples of many).  Looking up an
embedding, norms and softmax are no matrix products; what is recomputed counts once.
Linear attention counts as a recurrence (`LinearAttentionConfig.token_products`), however it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.encoders import encoder_params
from megatron_sov.model.families.weights import PLAIN_DECODER, Experts

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TABLES = (EMBEDDING, HEAD)
"""Names of the weights with a row for each token id."""
PER_WEIGHT = 6
"""A multiplication and an addition, forward and for each of the two gradients."""


@dataclass(frozen=True)
class LayerWeight:
    """A tensor that each of some layers has."""

    key: str
    """Name of the Megatron tensor; {l} stands for the layer."""
    shape: tuple[int, ...]
    """Global shape; of experts that of one."""
    layers: Sequence[int | None]
    """Layers of the trunk that have it; [None]: it is there once."""
    predicts: bool
    """Whether each prediction layer has it."""
    num_experts: int
    """Routed experts that have one each; 0: it is no expert's."""
    is_buffer: bool
    """Whether no gradient reaches it: a router's selection bias."""

    @cached_property
    def numel(self) -> int:
        """Elements in one layer, of all experts."""
        return math.prod(self.shape) * max(1, self.num_experts)


@lru_cache(maxsize=256)
def layer_weights(model: ModelConfig) -> tuple[LayerWeight, ...]:
    """Return the tensors of a model, encoders left out, each once for all layers that have it."""
    found = []
    for section in models.get(model.family).weights if model.family else PLAIN_DECODER:
        layers = section.layers(model)
        for entry in section.entries if layers else ():
            shape, key = entry.layout(model).block, section.megatron + entry.megatron
            # By name, since a family may declare a stack as one tensor (`Same`) or expert by expert
            # (`Experts`).
            routed = ".experts.experts." in key
            if routed and not isinstance(entry, Experts):  # a stack, whose first axis is the expert
                shape = shape[1:]
            if math.prod(shape):  # no shared experts are some of width 0
                found.append(LayerWeight(key, shape, layers, section.where.startswith("mtp"),
                                         model.num_experts if routed else 0, entry.fp32))
    return tuple(found)


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


def num_params(model: ModelConfig) -> ParamCount:
    weights = [w for w in layer_weights(model) if not w.is_buffer]
    # Prediction layers count on their own: published figures leave them out.
    trunk = [w for w in weights if not w.predicts]
    return ParamCount(sum(w.numel * len(w.layers) for w in trunk),
                      sum(_met(w, model) * len(w.layers) for w in trunk),
                      sum(w.numel for w in weights if w.predicts) * model.num_mtp_layers,
                      encoder_params(model))


def _met(weight: LayerWeight, model: ModelConfig) -> int:
    """Return the elements of a tensor that a token meets in one layer."""
    if not weight.num_experts:
        return weight.numel
    # `numel` is of all experts; a token meets as many as it is routed to.
    return weight.numel // weight.num_experts * model.num_experts_per_token


def multiplied_weights(model: ModelConfig) -> int:
    """Return the weights that a token is multiplied with: of projections, feed-forward networks, routers
    and heads."""
    # Each application of a prediction layer applies the head once more. The embedding is a look-up and has no
    # product.
    heads = (1 + model.num_predictions) * model.vocab_size * model.hidden_size
    return heads + sum(
        _met(w, model) * (model.num_predictions if w.predicts else len(w.layers))
        for w in layer_weights(model) if len(w.shape) == 2 and w.key not in TABLES)


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of forward and backward pass of a token, the mean over a row of `seq_len`."""
    # Causal: query i sees i + 1 keys, at most the window; the mean over a row is what a token costs.
    keys = [mean_keys(seq_len, window)
            for window, kind in zip(model.windows(), model.layer_types(), strict=True)
            if kind != "linear_attention"]
    keys += [mean_keys(seq_len, model.mtp_window())] * model.num_predictions
    latent = model.latent_attention
    # of a query and a key: their product, and the value's
    widths = model.head_dim + (model.head_dim if latent is None else latent.v_head_dim)
    linear = model.linear_attention
    states = 0 if linear is None else linear.token_products
    return PER_WEIGHT * (multiplied_weights(model) + model.num_heads * widths * sum(keys)
                         + model.num_linear_layers() * states)


def mean_keys(seq_len: int, window: int) -> float:
    """Return how many keys a query sees, itself included, the mean over a causal row.

    Args:
        seq_len: tokens of the row.
        window: keys that a query sees at most; 0: all before it.
    """
    window = min(window or seq_len, seq_len)
    # The first `window` queries see 1, 2, ... keys, all later ones the whole window.
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
