"""A recipe's structure at another size.

The size of a model is the number of parameters of its trunk that one token meets, without embeddings and
output head (N of Kaplan et al., arXiv 2001.08361): these are what a small model's size would otherwise
consist of. The rule: width over depth, the width of all heads together over the width, query heads over
key/value heads and the inner widths over the width stay those of the recipe; the number of experts, how
many a token visits, the leading dense layers, the pattern of attention and the vocabulary stay as they are;
the width of one head is the same for the whole ladder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_sov.config import ModelConfig
from megatron_sov.errors import UserError
from megatron_sov.models.count import num_params
from megatron_sov.obs.figures import large

STEPS = ((512, 32), (128, 8), (0, 4))
"""(least width, step): widths, inner ones too, are multiples of the step: large ones of what GPUs multiply
well, small ones of less, so that sizes can be met."""
MIN_HEAD_DIM = 8
HEADS_TOLERANCE = 0.15
"""How far the width of all heads may be from the rule, since heads are whole; else heads are made smaller."""
TOLERANCE = 0.1
"""How far a model may be from the size that was asked for, as a share of it."""
SHAPE_WEIGHT = 0.1
"""How much a share of width over depth counts beside a share of the size, when a shape is chosen."""
MAX_SIZE = 10**13
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_size(text: str, option: str) -> int:
    """Return a number of parameters such as 1500000, 250K, 1.5M or 1B.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMB]?)", text.strip().upper())
    size = round(float(found[1]) * _FACTORS[found[2]]) if found else 0
    if not 1 <= size <= MAX_SIZE:
        raise UserError(f"{option} {text!r}: must be a number of parameters, such as 250K, 4M or 1.5B, up to "
                        f"{large(MAX_SIZE)}")
    return size


def parse_sizes(text: str, option: str) -> list[int]:
    """Return sizes between commas, ascending.

    Raises:
        UserError: one is none, or stands twice.
    """
    sizes = sorted(parse_size(part, option) for part in text.split(","))
    if len(set(sizes)) < len(sizes):
        raise UserError(f"{option} {text}: names a size twice; leave one out")
    return sizes


def size_of(model: ModelConfig) -> int:
    """Return the parameters of the trunk that one token meets, without embeddings and head."""
    outside = (1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size
    return num_params(model).active - outside


def family(base: ModelConfig, sizes: Sequence[int], beyond: int) -> list[ModelConfig]:
    """Return `base` at each size, and last at one more, by which the width of heads is not chosen.

    Raises:
        UserError: its structure does not come that small, or near enough, or it has factors of one width.
    """
    factors = [f"model.{name} = {getattr(base, name)}" for name in (
        "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_multiplier")
        if getattr(base, name) not in (None, 1.0)]
    if factors:
        raise UserError(f"{', '.join(factors)}: such a factor is made for one width, and the ladder has no "
                        "rule for other ones; take a recipe without")
    if base.latent_attention is not None:
        raise UserError("model.latent_attention: the ladder has no rule for the widths of latent attention; "
                        "take a recipe without")
    head_dim = base.head_dim
    found = [_nearest(base, size, head_dim) for size in sizes]
    while head_dim // 2 >= MIN_HEAD_DIM and any(_misfit(base, model) > HEADS_TOLERANCE for model in found):
        head_dim = head_dim // 4 * 2  # even, for rotations are of pairs
        found = [_nearest(base, size, head_dim) for size in sizes]
    found.append(_nearest(base, beyond, head_dim))
    for model, size in zip(found, [*sizes, beyond], strict=True):
        if abs(size_of(model) / size - 1) > TOLERANCE:
            raise UserError(f"--sizes: {large(size)} parameters cannot be had of this structure; the nearest "
                            f"size is {large(size_of(model))} (width {model.hidden_size}, "
                            f"{model.num_layers} layers)")
    return found


def scaled(base: ModelConfig, width: int, num_layers: int, head_dim: int) -> ModelConfig:
    """Return `base` at another width and depth."""
    ratio, group = width / base.hidden_size, base.num_heads // base.num_kv_heads
    heads_width = base.num_heads * base.head_dim * ratio
    num_kv_heads = max(1, round(heads_width / (head_dim * group)))

    def inner(ffn_dim: int) -> int:
        step = _step(ffn_dim * ratio)
        return max(step, round(ffn_dim * ratio / step) * step) if ffn_dim else 0

    return replace(base, hidden_size=width, num_layers=num_layers, head_dim=head_dim,
                   num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads,
                   dense_ffn_dim=inner(base.dense_ffn_dim), expert_ffn_dim=inner(base.expert_ffn_dim))


def _step(width: float) -> int:
    """Return what widths of this size are multiples of."""
    return next(step for least, step in STEPS if width >= least)


def _misfit(base: ModelConfig, model: ModelConfig) -> float:
    """Return how far the width of all heads together is from its part of the width, as a share."""
    wanted = base.num_heads * base.head_dim / base.hidden_size
    return abs(model.num_heads * model.head_dim / model.hidden_size / wanted - 1)


def _nearest(base: ModelConfig, size: int, head_dim: int) -> ModelConfig:
    """Return the model whose size and shape are nearest to what is asked for."""
    aspect = base.hidden_size / base.num_layers

    def cost(model: ModelConfig) -> float:
        shape = model.hidden_size / model.num_layers / aspect
        return abs(math.log(size_of(model) / size)) + SHAPE_WEIGHT * abs(math.log(shape))

    return min(_shapes(base, size, head_dim, aspect), key=cost)


def _shapes(base: ModelConfig, size: int, head_dim: int, aspect: float) -> Iterator[ModelConfig]:
    """Yield shapes whose width over depth is near the recipe's, from the smallest to the first that are too
    large."""
    least = _fewest_layers(base)
    width = 0
    while True:
        width += _step(width)
        fewest = max(least, math.floor(width / aspect) - 1)
        shapes = [scaled(base, width, fewest + more, head_dim) for more in range(4)]
        yield from shapes
        if all(size_of(model) > 2 * size for model in shapes):
            return


def _fewest_layers(base: ModelConfig) -> int:
    """Return the layers that have every kind of the recipe: dense and routed, sliding and global."""
    kinds = base.num_dense_layers + 1 if base.num_moe_layers() else 1
    pattern = base.attention_pattern
    return max(kinds, *(pattern.index(letter) + 1 for letter in set(pattern)))
