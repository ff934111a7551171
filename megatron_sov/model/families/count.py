"""Parameter counts and training FLOPs of a model, computed from the config and the family's weight map.

A tied output head counts once, as the embedding. The router's selection bias is a buffer and does not count.

Model FLOPs follow PaLM (arXiv 2204.02311, appendix B): 6 per weight that multiplies a token (2 in the forward
pass, 4 in the backward pass), and 12 x heads x head size per key that a query attends to. Only a token's
routed experts count, and only the causal half of attention inside the window, as in Megatron-LM; a row counts
as one document, which overestimates rows with several documents. Embedding look-ups, norms, softmax and
recomputation do not count. Linear attention counts as a recurrence
(`LinearAttentionConfig.products_per_token`) for all kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.encoders import count_encoder_params
from megatron_sov.model.families.weights import PLAIN_DECODER, Experts

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TABLES = (EMBEDDING, HEAD)
"""Names of weights with a row per token id."""
PER_WEIGHT = 6
"""FLOPs per weight: multiplication and addition in the forward pass and for two gradients."""


@dataclass(frozen=True)
class LayerWeight:
    """A tensor that occurs in several layers."""

    key: str
    """Megatron tensor name; {l} stands for the layer index."""
    shape: tuple[int, ...]
    """Global shape; for experts the shape for one expert."""
    layers: Sequence[int | None]
    """Transformer layers with this tensor; [None] for tensors outside layers."""
    predicts: bool
    """Whether prediction layers have this tensor."""
    num_experts: int
    """Routed experts with this tensor; 0 outside experts."""
    is_buffer: bool
    """Whether the tensor has no gradient (the router's selection bias)."""

    @cached_property
    def numel(self) -> int:
        """Elements per layer, for all experts."""
        return math.prod(self.shape) * max(1, self.num_experts)


@lru_cache(maxsize=256)
def layer_weights(model: ModelConfig) -> tuple[LayerWeight, ...]:
    """Return the tensors of a model without encoders, each once for all its layers."""
    weights = []
    for section in models.get_family(model.family).weights if model.family else PLAIN_DECODER:
        layers = section.layers(model)
        for entry in section.entries if layers else ():
            shape, key = entry.layout(model).block, section.megatron + entry.megatron
            # A family may declare a stack of experts as one tensor (`Same`) or by expert (`Experts`).
            routed = ".experts.experts." in key
            if routed and not isinstance(entry, Experts):  # a stack, whose first axis is the expert
                shape = shape[1:]
            if math.prod(shape):  # 0 for a model without shared experts
                weights.append(LayerWeight(key, shape, layers, section.where.startswith("mtp"),
                                           model.num_experts if routed else 0, entry.fp32))
    return tuple(weights)


@dataclass(frozen=True)
class ParamCount:
    """Parameter counts. `total` and `active` exclude multi-token prediction layers and encoders, like
    published figures."""

    total: int
    """Parameters of transformer layers, embedding and output head."""
    active: int
    """`total` without the experts that a token is not routed to."""
    mtp: int
    """Parameters of multi-token prediction layers, with all experts, without embedding and output head."""
    encoders: int = 0
    """Parameters of image and audio encoders, adapters and compressor."""


def count_params(model: ModelConfig) -> ParamCount:
    weights = [w for w in layer_weights(model) if not w.is_buffer]
    # Published figures exclude prediction layers.
    trunk = [w for w in weights if not w.predicts]
    return ParamCount(sum(w.numel * len(w.layers) for w in trunk),
                      sum(_active_elements(w, model) * len(w.layers) for w in trunk),
                      sum(w.numel for w in weights if w.predicts) * model.num_mtp_layers,
                      count_encoder_params(model))


def _active_elements(weight: LayerWeight, model: ModelConfig) -> int:
    """Return the elements of a tensor that process a token in one layer."""
    if not weight.num_experts:
        return weight.numel
    # `numel` counts all experts.
    return weight.numel // weight.num_experts * model.num_experts_per_token


def count_multiplied_weights(model: ModelConfig) -> int:
    """Count the weights that multiply a token: projections, feed-forward networks, routers, output heads."""
    # Every application of a prediction layer applies the output head, too. The embedding is a look-up.
    heads = (1 + model.num_predictions) * model.vocab_size * model.hidden_size
    return heads + sum(
        _active_elements(w, model) * (model.num_predictions if w.predicts else len(w.layers))
        for w in layer_weights(model) if len(w.shape) == 2 and w.key not in TABLES)


def compute_train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return FLOPs per token for forward and backward pass, averaged over a row of `seq_len` tokens."""
    # Causal attention: query i attends to i + 1 keys, at most the window.
    keys = [compute_mean_keys(seq_len, window)
            for window, kind in zip(model.windows(), model.layer_types(), strict=True)
            if kind != "linear_attention"]
    keys += [compute_mean_keys(seq_len, model.mtp_window())] * model.num_predictions
    latent = model.latent_attention
    # Products per query and key: query x key, and weight x value.
    widths = model.head_dim + (model.head_dim if latent is None else latent.v_head_dim)
    linear = model.linear_attention
    states = 0 if linear is None else linear.products_per_token
    return PER_WEIGHT * (count_multiplied_weights(model) + model.num_heads * widths * sum(keys)
                         + model.num_linear_layers() * states)


def compute_mean_keys(seq_len: int, window: int) -> float:
    """Return the mean number of keys per query in a causal row, the query's own key included.

    Args:
        seq_len: tokens per row.
        window: maximum keys per query; 0: no limit.
    """
    window = min(window or seq_len, seq_len)
    # The first `window` queries attend to 1, 2, ... keys, later queries to `window` keys.
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
