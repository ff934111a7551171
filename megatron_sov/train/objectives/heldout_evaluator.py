"""Loss on held-out documents per source, in nats per token and bits per byte.

Bits per byte do not depend on the tokenizer, so runs with different tokenizers can be compared."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_sov.chat.encode import TYPE_RESPONSE
from megatron_sov.chat.marks import KIND, KINDS
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.engine.parallel.values import Shapes, flatten_tensors, unflatten_tensors
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import PackedRow, build_heldout_samples, build_row, join_rows
from megatron_sov.train.data.sources import Source, tokenizer_folder
from megatron_sov.train.data.token_bytes import count_token_bytes
from megatron_sov.train.data.token_shards import Documents
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch, shift_labels

TURN = "turn"
"""Column of a row: 1 for labels in a conversation's first learned turn, 2 in the second, ...; 0 for labels
outside learned turns."""
TURNS: dict[str, Callable[[Any], Any]] = {"first": lambda turn: turn == 1, "later": lambda turn: turn > 1}
"""Conversation part -> test for numbers in the column `TURN`."""
PARTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{part: (TURN, selects) for part, selects in TURNS.items()},
    **{name: (KIND, partial(operator.eq, kind)) for name, kind in KINDS.items()}}
"""Conversation part -> column, and test for numbers in the column."""
SUMS: Shapes = dict.fromkeys(("nats", "tokens", "size_bytes", "accepted", "drafts",
                              *(f"{part}_{unit}" for part in PARTS for unit in ("nats", "tokens"))), ())
"""Sums over a source's targets, as scalars: loss, targets, UTF-8 bytes, drafts that the trunk accepts,
drafts, and loss and targets for each part in `PARTS`."""
ActionWrapper = Callable[[str, Callable[[], Any]], Any]
"""Function that calls an action for a source and returns the action's result."""


@dataclass(frozen=True)
class PartLoss:
    loss: float
    """Nats per token."""
    tokens: int
    """Evaluated targets."""


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss on a source's held-out documents."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Total nats / ln 2 / total UTF-8 bytes of the targets; NaN for data without a tokenizer."""
    tokens: int
    """Evaluated targets."""
    mtp_acceptance: float | None = None
    """Share of the prediction layer's drafts that greedy self-speculative decoding would accept, because the
    trunk chooses equal tokens; None for models without prediction layers."""
    turns: Mapping[str, PartLoss] = field(default_factory=dict)
    """For conversations: "first" has each conversation's first learned turn, "later" has further turns."""
    kinds: Mapping[str, PartLoss] = field(default_factory=dict)
    """For conversations with the column `KIND`: "thought", "call" and "answer" (`chat.marks`)."""


class HeldoutEvaluator:
    """Evaluates a policy on each source's held-out split, with a fixed choice of documents."""

    def __init__(self, sources: list[Source], bytes_of_token: np.ndarray | None, seq_len: int,
                 rows_per_batch: int, max_tokens: int, world: ParallelWorld) -> None:
        self._bytes = (None if bytes_of_token is None
                       else torch.from_numpy(bytes_of_token).to(get_local_device()))
        self._rows_per_batch = rows_per_batch
        self._batches = {
            source.name: self._load_micro_batches(index, source, seq_len, max_tokens, world)
            for index, source in enumerate(sources) if source.num_tokens.get("heldout", 0) > 1}

    @classmethod
    def from_config(cls, config: RunConfig, sources: list[Source], max_seq_len: int,
                    world: ParallelWorld) -> "HeldoutEvaluator":
        """Build the evaluator of a run; documents are cut to the run's longest sample `max_seq_len`."""
        tokenizer = tokenizer_folder(sources)
        sizes = count_token_bytes(tokenizer, config.model.vocab_size) if tokenizer else None
        return cls(sources, sizes, max_seq_len, config.train.micro_batch_size,
                   config.data.heldout_tokens, world)

    def _load_micro_batches(self, index: int, source: Source, seq_len: int, max_tokens: int,
                            world: ParallelWorld) -> list[PackedRow]:
        """Return this rank's micro-batches; the last micro-batches may contain only padding."""
        shard = source.open_split("heldout")
        samples = build_heldout_samples(shard, index, seq_len, max_tokens)
        per_round = self._rows_per_batch * world.dp_size
        # every rank needs an equal number of micro-batches, or a collective in the forward pass would hang
        samples += [OrderedSample(index, ())] * (-len(samples) % per_round)
        rows = [build_heldout_row(s, shard, source, seq_len) for s in samples]
        first = world.dp_rank * self._rows_per_batch
        return [join_rows(rows[i:i + self._rows_per_batch]) for i in range(first, len(rows), per_round)]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches on this rank, summed over sources."""
        return sum(map(len, self._batches.values()))

    def run(self, policy: ForwardModel, wrap: ActionWrapper = lambda source, action: action(),
            on_micro_batch: Callable[[], object] = lambda: None) -> dict[str, HeldoutLoss]:
        """Return the loss on each source with held-out targets. Collective.

        `wrap` calls the forward passes of a source. `on_micro_batch` is called on the last pipeline stage
        after each micro-batch."""
        def compute_sums(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
            sums = self._sum_losses(hidden, head, batch)
            on_micro_batch()
            return sums

        results = {}
        for name, rows in self._batches.items():
            micro_batches = [build_micro_batch(r) for r in rows]
            sums = wrap(name, partial(policy.map, micro_batches, compute_sums))
            local = torch.stack(sums).sum(0) if sums else torch.zeros(len(SUMS), dtype=torch.float64)
            totals = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local.cpu()))
            sums_of_source = unflatten_tensors(totals, SUMS)
            if sums_of_source["tokens"] > 0:  # prompts have no targets, and a loss of 0 would look perfect
                results[name] = compute_heldout_loss(
                    {key: float(value) for key, value in sums_of_source.items()})
        return results

    def _sum_losses(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        losses = -head.logprobs(hidden[0], batch.labels).double()
        is_target = (batch.weights > 0).double()
        if self._bytes is None:
            # without a tokenizer, NaN passes through the sums to bits per byte
            size_bytes = torch.full_like(losses, math.nan)
        else:
            size_bytes = self._bytes[batch.labels].double()
        accepted, drafts = losses.new_zeros(2)
        if len(hidden) > 1:
            accepted, drafts = _count_accepted_drafts(hidden, head, batch)
        sums = {"nats": (losses * is_target).sum(), "tokens": is_target.sum(),
                "size_bytes": (size_bytes * is_target).sum(), "accepted": accepted, "drafts": drafts}
        for part, (column, selects) in PARTS.items():
            mask = is_target * selects(batch.columns.get(column, torch.zeros_like(losses)))
            sums |= {f"{part}_nats": (losses * mask).sum(), f"{part}_tokens": mask.sum()}
        return flatten_tensors({name: sums[name] for name in SUMS})


def build_heldout_row(sample: OrderedSample, documents: Documents, source: Source, seq_len: int) -> PackedRow:
    """Build a row with held-out documents; conversations get the columns `TURN` and `KIND`."""
    if source.format != "chat":
        return build_row(sample, documents, seq_len)
    return _add_turns(build_row(sample, documents, seq_len, columns=(KIND,)), documents)


def _add_turns(row: PackedRow, documents: Documents) -> PackedRow:
    """Add the column `TURN`; a conversation's later windows continue its numbers."""
    numbers = np.zeros(len(row.tokens), np.float32)
    for first, _, (document, start, count) in row.origins:
        end = min(start + count + 1, int(documents.lengths[document]))  # includes the last label
        is_learned = ((documents.types(document, 0, end) == TYPE_RESPONSE)
                      & (documents.loss_weights(document, 0, end) > 0))
        # a turn begins at a learned token after an unlearned token, and its number is the running count
        begins_turn = is_learned.copy()
        begins_turn[1:] &= ~is_learned[:-1]
        numbers[first:first + end - start - 1] = (begins_turn.cumsum() * is_learned)[start + 1:]
    return dataclasses.replace(row, columns={**row.columns, TURN: numbers})


def compute_heldout_loss(sums: Mapping[str, float]) -> HeldoutLoss:
    """Compute means from a source's `SUMS`."""
    nats, size_bytes = sums["nats"], sums["size_bytes"]
    bits_per_byte = nats / math.log(2) / size_bytes if size_bytes else math.nan
    parts = {part: PartLoss(sums[f"{part}_nats"] / tokens, int(tokens))
             for part in PARTS if (tokens := sums[f"{part}_tokens"])}
    return HeldoutLoss(nats / sums["tokens"], bits_per_byte, int(sums["tokens"]),
                       sums["accepted"] / sums["drafts"] if sums["drafts"] else None,
                       turns={part: parts[part] for part in TURNS if part in parts},
                       kinds={part: parts[part] for part in KINDS if part in parts})


def _count_accepted_drafts(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
    """Return [2] float64: accepted drafts and drafts from the first prediction layer."""
    trunk_tokens, drafts = head.predict_row(hidden[0]), head.predict_row(hidden[1])
    is_target = shift_labels(batch, 1).weights > 0
    # the layer drafts token t + 2 at position t, and the trunk chooses it at t + 1
    return torch.stack([((drafts == trunk_tokens.roll(-1)) & is_target).sum(), is_target.sum()]).double()
