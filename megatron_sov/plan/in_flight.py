"""What waits on a pipeline stage for the backward pass: micro-batches under way, and what each of them keeps.

Held against saved tensors of whole steps in `benchmarks/plan_activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.config import RunConfig
from megatron_sov.config.lora import HEAD
from megatron_sov.plan.activations import (
    INDEX_BYTES,
    Kind,
    Saved,
    kept,
    kinds,
    prediction_kind,
    saved,
    tokens_of,
)
from megatron_sov.plan.held import FLOAT32_BYTES, ITEM_BYTES, chunk_layers


def under_way(pp: int, vpp: int, stage: int, num_micro_batches: int) -> list[int]:
    """Return how many micro-batches wait at most for the backward pass of each of a stage's chunks.

    1F1B (arXiv 2104.04473, section 2.2), interleaved (section 2.3): forward passes run ahead by the library's
    number (`schedules.get_pp_rank_microbatches`, 0.16.1), in groups of `pp` for each chunk.

    Args:
        pp: pipeline stages.
        vpp: chunks of each.
        stage: 0-based.
        num_micro_batches: of a step, on each replica.
    """
    if vpp == 1:
        return [min(pp - stage, num_micro_batches)]
    ahead = min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, num_micro_batches * vpp)
    rounds, rest = divmod(ahead, pp * vpp)
    return [rounds * pp + min(pp, max(0, rest - chunk * pp)) for chunk in range(vpp)]


@dataclass(frozen=True)
class Stored:
    """Bytes of activations on one process."""

    waiting: int
    """Kept by layers, embedding and prediction layers for the backward pass, of all micro-batches under
    way."""
    head: int
    """What a loss leaves for its backward pass: gradients of hidden states and of the head's weight."""
    recomputed: int
    """What the largest layer saves anew while it is computed again; 0: nothing is."""
    norms: int
    """Of `waiting`, what the newest micro-batch keeps behind the trunk's layers, and lets go before any of
    them is computed again."""
    largest: int
    """What the largest layer saves where nothing is recomputed."""
    unevenly: int
    """Of `waiting` and `recomputed`, what routed experts keep: more, where routing is uneven."""

    @property
    def saved(self) -> int:
        """What autograd saves at most."""
        return self.waiting + max(self.head, self.recomputed - self.norms)


def stored(config: RunConfig, stage: int, seq_len: int, num_micro_batches: int) -> Stored:
    """Return what a process of a stage keeps.

    Args:
        config: model, layout, precision, recomputation.
        stage: pipeline stage, 0-based.
        seq_len: tokens of a sample.
        num_micro_batches: of a step, on each replica.
    """
    m, p = config.model, config.parallel
    row = seq_len * config.train.micro_batch_size
    of_layers = kinds(m)
    counts = under_way(p.pp, p.vpp, stage, num_micro_batches)
    last = stage == p.pp - 1
    here: dict[Kind, int] = {}
    for layers, count in zip(chunk_layers(p, stage, m.num_layers), counts, strict=True):
        for layer in layers:
            here[of_layers[layer]] = here.get(of_layers[layer], 0) + count
    if last and m.num_mtp_layers:
        kind = prediction_kind(m)
        here[kind] = here.get(kind, 0) + counts[-1] * m.num_mtp_layers
    wholes = {kind: saved(config, row, kind) for kind in here}
    keeps = {kind: kept(config, row, kind, whole) for kind, whole in wholes.items()}
    waiting = sum(keeps[kind] * count for kind, count in here.items())
    waiting += (stage == 0) * counts[0] * row // p.cp * INDEX_BYTES
    norms = last * _behind_layers(config, row)
    waiting += counts[-1] * norms
    again = {kind: wholes[kind].total - keeps[kind] for kind in here} if config.train.recompute else {}
    largest = max(here, key=lambda kind: wholes[kind].total)
    return Stored(waiting=waiting, head=head_keeps(config, row) if last else 0,
                  recomputed=max(again.values(), default=0), norms=norms, largest=wholes[largest].total,
                  unevenly=_of_experts(config, here, wholes) + (
                      wholes[largest].routed if again.get(largest) else 0))


def _of_experts(config: RunConfig, here: dict[Kind, int], wholes: dict[Kind, Saved]) -> int:
    """Return the bytes of routed tokens among what waits."""
    if config.train.recompute is True or "moe" in config.gpu.recompute_modules:
        return 0
    return sum(wholes[kind].routed * count for kind, count in here.items())


def _behind_layers(config: RunConfig, row_tokens: int) -> int:
    """Return what the last stage keeps of a micro-batch beside layers: final norm, and around a prediction
    layer three norms and the projection of two states to one."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, fused = tokens_of(config, row_tokens), config.train.precision == "bf16"
    hidden = tokens.share * m.hidden_size * item
    norm = hidden if fused else 2 * hidden + tokens.share * item
    if not m.num_mtp_layers:
        return norm
    around = tokens.local * INDEX_BYTES + m.num_mtp_layers * (
        # recomputed, a prediction layer keeps its two inputs
        2 * hidden if config.train.recompute is True else 3 * norm + 2 * hidden)
    return norm + around


def head_keeps(config: RunConfig, row_tokens: int) -> int:
    """Return what the head's losses leave in the forward pass: the gradient of every hidden state, of whole
    rows under tensor parallelism, and that of the head's weight (`mcore.model.chunked_head`)."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, wide = tokens_of(config, row_tokens), max(ITEM_BYTES[config.train.precision], FLOAT32_BYTES)
    rows = -(-m.vocab_size // config.parallel.tp)
    trained = not config.lora.on or HEAD in config.lora.adapted(m)
    of_weight = rows * m.hidden_size * wide if trained else 0
    return (1 + m.num_mtp_layers) * (of_weight + tokens.local * (m.hidden_size * item + wide))
