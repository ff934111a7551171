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
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count
from megatron_sov.model.config import (
    GroupConfig, ModelConfig, OptimConfig, ParallelConfig, PhaseConfig, RunConfig)
from megatron_sov.model.families.count import num_params

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
                        f"{format_count(MAX_SIZE)}")
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
    # embedding and head: most of a small model, and no part of N
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
    if base.linear_attention is not None:
        raise UserError("model.linear_attention: the ladder has no rule for the widths of linear attention; "
                        "take a base model without it")
    if base.latent_attention is not None:
        raise UserError("model.latent_attention: the ladder has no rule for the widths of latent attention; "
                        "take a recipe without")
    head_dim = base.head_dim
    found = [_nearest(base, size, head_dim) for size in sizes]
    while head_dim // 2 >= MIN_HEAD_DIM and any(_misfit(base, model) > HEADS_TOLERANCE for model in found):
        # smaller heads until their joint width comes near its share; one head is as wide at all sizes
        head_dim = head_dim // 4 * 2  # even, for rotations are of pairs
        found = [_nearest(base, size, head_dim) for size in sizes]
    # the predicted size follows the ladder's heads and does not choose them
    found.append(_nearest(base, beyond, head_dim))
    for model, size in zip(found, [*sizes, beyond], strict=True):
        if abs(size_of(model) / size - 1) > TOLERANCE:
            raise UserError(f"--sizes: {format_count(size)} parameters cannot be had of this structure; "
                            "the nearest "
                            f"size is {format_count(size_of(model))} (width {model.hidden_size}, "
                            f"{model.num_layers} layers)")
    return found


def scaled(base: ModelConfig, width: int, num_layers: int, head_dim: int) -> ModelConfig:
    """Return `base` at another width and depth."""
    ratio, group = width / base.hidden_size, base.num_heads // base.num_kv_heads
    # queries per key/value head stay: kv heads are rounded, query heads follow
    heads_width = base.num_heads * base.head_dim * ratio
    num_kv_heads = max(1, round(heads_width / (head_dim * group)))

    def inner(ffn_dim: int) -> int:
        # multiples that kernels like, and never 0
        step = _step(ffn_dim * ratio)
        return max(step, round(ffn_dim * ratio / step) * step) if ffn_dim else 0

    return replace(base, **base.at_depth(num_layers), hidden_size=width, head_dim=head_dim,
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
        # on a log scale: twice too large is as bad as half
        return abs(math.log(size_of(model) / size)) + SHAPE_WEIGHT * abs(math.log(shape))

    return min(_shapes(base, size, head_dim, aspect), key=cost)


def _shapes(base: ModelConfig, size: int, head_dim: int, aspect: float) -> Iterator[ModelConfig]:
    """Yield shapes whose width over depth is near the recipe's, from the smallest to the first that are too
    large."""
    least = _fewest_layers(base)
    width = 0
    while True:
        width += _step(width)
        # around width / aspect, the recipe's width over depth
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


# The models of a ladder: the settings of each run.


Rates = Literal["mup", "step-law"]
STEP_LAW_LR = (1.79, -0.713, 0.307)
STEP_LAW_BATCH = (0.58, 0.571)
WARMUP_SHARE = 0.05
"""Part of a model's steps over which its rate climbs: ladders have runs of all lengths."""
_MATRICES = ("*.linear_qkv.weight", "*.linear_proj.weight", "*.linear_fc1.weight", "*.linear_fc2.weight")
LEAST_STEPS = 60
"""A run of fewer steps tells nothing of its size."""
NUM_CHECKPOINTS = 4


# Learning rates, initial weights and batch sizes of a ladder's models. mup (Yang et al., arXiv 2203.03466,
# table 8, for Adam): what holds at the recipe's own width is carried to another one. Weights into which a
# width goes (attention, feed-forward, router, output head) learn at a rate times base width / width, and
# begin with a spread times sqrt(base width / width); embeddings, norms and biases learn at the same rate at
# every width. Embeddings begin with the spread of the matrices, where the paper would have the same at
# every width. A head that is the embedding too is treated as a head. Weight decay is divided by a rate's
# factor, so that a step takes the same share of a weight away. What Muon updates learns at the rate at
# which its outputs change as much at every width (Yang et al., arXiv 2310.17813), which depends on
# `optim.muon_scale`. Depth: what writes into the residual stream begins with 1 / sqrt(2 layers), as
# everywhere in this project; rates do not depend on it. The output head begins with the spread of the other
# matrices, as it does in the recipes, where the paper would have it smaller: its logits begin no larger at
# any width, and learn as large (the coordinate check of tests/publish/ladder/test_rates.py). step-law (Li et
# al., arXiv 2503.04715): one rate for all, 1.79 N^-0.713 D^0.307, and 0.58 D^0.571 tokens a step, fitted on
# 3,700 models from 60 M to 1 B parameters, N without embeddings, D tokens.


def mup_model(model: ModelConfig, base_width: int) -> ModelConfig:
    """Return a model with the spread of initial weights that belongs to its width."""
    return replace(model, init_std=model.init_std * math.sqrt(base_width / model.hidden_size))


def mup_optim(optim: OptimConfig, model: ModelConfig, base_width: int) -> OptimConfig:
    """Return an optimizer whose matrices learn at the rate that belongs to the model's width."""
    width = model.hidden_size
    # mup, table 8: Adam's rate for weights that a width goes into
    factor = head = base_width / width
    if optim.name == "muon":  # never of the head
        # square matrices stand for all of the trunk: their ratio of sides is the same at every width
        factor = _muon_reach(optim, base_width, base_width) / _muon_reach(optim, width, width)
    factors = dict.fromkeys(_MATRICES, factor)
    if model.num_moe_layers():
        # a router is [experts, width]: its sides do not grow together
        factors["*.router.weight"] = head if optim.name != "muon" else (
            _muon_reach(optim, model.num_experts, base_width) / _muon_reach(optim, model.num_experts, width))
    if model.num_mtp_layers:
        factors["*.eh_proj.weight"] = factor
    # a head that is the embedding too is treated as a head
    factors["*.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"] = head
    # decay over the factor: a step's decay is rate x decay, which should not shrink with the rate
    groups = tuple(GroupConfig(pattern, lr_scale=scale, weight_decay=optim.weight_decay / scale)
                   for pattern, scale in factors.items())
    return replace(optim, groups=groups + optim.groups)


def _muon_reach(optim: OptimConfig, rows: int, columns: int) -> float:
    """Return how much a step of Muon with rate 1 changes the outputs of a matrix [rows, columns] whose inputs
    are of size 1: its factor on an orthogonal update, over that of `spectral`."""
    spectral = math.sqrt(rows / columns)
    return {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)), "original": max(1.0, spectral),
            "spectral": spectral}[optim.muon_scale] / spectral


def step_law_optim(optim: OptimConfig, num_params: int, num_tokens: int) -> OptimConfig:
    """Return an optimizer at the fitted rate; the least rate keeps its share of it."""
    factor, by_params, by_tokens = STEP_LAW_LR
    lr = factor * num_params**by_params * num_tokens**by_tokens
    # the floor of the schedule keeps its ratio to the peak
    return replace(optim, lr=lr, min_lr=optim.min_lr / optim.lr * lr)


def step_law_batch(num_tokens: int, seq_len: int) -> int:
    """Return the samples of a step at the fitted batch size; at least 1."""
    factor, by_tokens = STEP_LAW_BATCH
    return max(1, round(factor * num_tokens**by_tokens / seq_len))


def warmup(optim: OptimConfig, num_steps: int) -> OptimConfig:
    """Return an optimizer whose warm-up is a part of a run of so many steps."""
    return replace(optim, warmup_steps=max(1, round(WARMUP_SHARE * num_steps)), warmup_tokens=0,
                   schedule_by="steps")


@dataclass(frozen=True)
class Member:
    name: str
    """Of its folder: size and, where there are several, tokens per parameter."""
    num_params: int
    """N: parameters of the trunk that one token meets, without embeddings and head."""
    num_tokens: int
    """D: tokens that it learns from."""
    config: RunConfig


def members(base: RunConfig, sizes: Sequence[int], predicted: int, tokens_per_param: Sequence[float],
            rates: Rates, *, keeps_layout: bool) -> list[Member]:
    """Return a run for each size and number of tokens, those of the predicted size last.

    Args:
        base: the recipe, whose width and rates the ladder's are derived from.
        sizes: parameters, see `family`.
        predicted: one more size.
        tokens_per_param: D / N.
        rates: rule of the learning rates.
        keeps_layout: whether its layout is meant for the ladder; else each model is on one process.

    Raises:
        UserError: the structure does not come at a size, two sizes give one model, or a run would have too
            few steps.
    """
    found, problems = [], []
    for size, model in zip([*sizes, predicted], family(base.model, sizes, predicted), strict=True):
        for ratio in tokens_per_param:
            name = format_count(size).replace(" ", "") + (f"-{ratio:g}" if len(tokens_per_param) > 1 else "")
            num_params = size_of(model)
            num_tokens = round(ratio * num_params)
            # one process by default: a small model does not fit the layout of a large one
            config = replace(base, model=model, parallel=base.parallel if keeps_layout else ParallelConfig(),
                             data=replace(base.data, phases=tuple(map(_whole, base.data.phases))))
            config = _trained(config, base, num_params, num_tokens, rates)
            steps = config.num_steps()
            if steps < LEAST_STEPS:
                problems.append(f"{name}: {format_count(num_tokens)} tokens make {steps} steps of "
                                f"train.global_batch_size = {config.train.global_batch_size}, at least "
                                f"{LEAST_STEPS} are needed")
            found.append(Member(name, num_params, num_tokens, config))
    names = [m.name for m in found]
    # coarse steps of width can make two sizes one model: a law needs different ones
    if len(set(names)) < len(names) or len({m.num_params for m in found}) <= len(sizes):
        raise UserError(f"--sizes: some give the same model or name ({', '.join(names)}); take sizes that "
                        "are further apart")
    if problems:
        raise UserError(f"{problems[0]}; lower --set train.global_batch_size, or raise --tokens-per-param")
    return found


def _whole(phase: PhaseConfig) -> PhaseConfig:
    """Return a phase with its part of the run kept, at the run's own batch size and rate."""
    # phases keep their share of a run whose length is another for each size
    return replace(phase, tokens=0, share=phase.tokens or phase.share, global_batch_size=0, lr=0.0,
                   rewarm_steps=0)


def _trained(config: RunConfig, base: RunConfig, num_params: int, num_tokens: int, rates: Rates) -> RunConfig:
    """Return settings with the rates, batch size and length that belong to the size."""
    # the length is in tokens; ramps, evaluations and exports are of the large run
    train = replace(config.train, steps=0, tokens=num_tokens, ramp_from_batch_size=0, ramp_increment=0,
                    ramp_steps=0, eval_every_steps=0, export_every_checkpoints=0, keep_checkpoints=1)
    model, optim = config.model, config.optim
    if rates == "mup":
        model = mup_model(model, base.model.hidden_size)
        optim = mup_optim(optim, model, base.model.hidden_size)
    else:
        optim = step_law_optim(optim, num_params, num_tokens)
        batch = step_law_batch(num_tokens, config.data.max_seq_len())
        train = replace(train, global_batch_size=batch, micro_batch_size=_divisor(
            batch, train.micro_batch_size))
    config = replace(config, model=model, train=train)
    steps = config.num_steps()
    return replace(config, optim=warmup(optim, steps), train=replace(
        train, checkpoint_every_steps=max(1, -(-steps // NUM_CHECKPOINTS)), keep_every_steps=0))


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
