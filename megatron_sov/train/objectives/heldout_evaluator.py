"""Loss on held-out documents, per source, in nats per token and bits per byte.

Bits per byte, not only the mean loss: it does not depend on the tokenizer, so runs with different
ones can be compared.
"""

from __future__ import annotations

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
from megatron_sov.train.data.token_bytes import count_token_bytes
from megatron_sov.train.data.token_shards import Documents, Source, tokenizer_folder
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch, shift_labels

TURN = "turn"
"""Column of a row: 1 for labels of a conversation's first learned turn, 2 for the second, ...; 0 for labels
that no learned turn holds."""


def with_turns(row: PackedRow, documents: Documents) -> PackedRow:
    """Return a row of conversations with the column `TURN`; a conversation that was begun in another row
    goes on counting."""
    numbers = np.zeros(len(row.tokens), np.float32)
    for first, _, (document, start, count) in row.origins:
        end = min(start + count + 1, int(documents.lengths[document]))  # behind its last label
        learned = ((documents.types(document, 0, end) == TYPE_RESPONSE)
                   & (documents.loss_weights(document, 0, end) > 0))
        # a turn begins where a learned token follows one that is not; the running count of beginnings numbers
        # the turns, and tokens between them get 0
        begins = learned.copy()
        begins[1:] &= ~learned[:-1]
        numbers[first:first + end - start - 1] = (begins.cumsum() * learned)[start + 1:]
    return dataclasses.replace(row, columns={**row.columns, TURN: numbers})


TURNS: dict[str, Callable[[Any], Any]] = {"first": lambda turn: turn == 1, "later": lambda turn: turn > 1}
"""Learned turns of a conversation that are told apart -> which numbers of the column `TURN` they have."""
PARTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{part: (TURN, chosen) for part, chosen in TURNS.items()},
    **{name: (KIND, partial(operator.eq, kind)) for name, kind in KINDS.items()}}
"""Parts of conversations that are told apart -> column, and which of its numbers they have."""
SUMS: Shapes = dict.fromkeys(("nats", "tokens", "size_bytes", "accepted", "drafts",
                              *(f"{part}_{of}" for part in PARTS for of in ("nats", "tokens"))), ())
"""What is summed over the targets of a source: loss, targets, their bytes,
drafts that the trunk accepts, drafts; loss and targets of each of `PARTS`."""
Around = Callable[[str, Callable[[], Any]], Any]
"""(source, action) -> what the action returns."""


@dataclass(frozen=True)
class PartLoss:
    """Result on a part of conversations."""

    loss: float
    """Nats per token."""
    tokens: int
    """Targets evaluated."""


@dataclass(frozen=True)
class HeldoutLoss:
    """Result on one source."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Nats of all targets / ln 2 / UTF-8 bytes of all targets; NaN where the tokenizer is not known."""
    tokens: int
    """Targets evaluated."""
    mtp_acceptance: float | None = None
    """Share of the prediction layer's best tokens that the trunk then chooses too: what greedy
    self-speculative decoding would accept of its drafts; None without such a layer."""
    turns: Mapping[str, PartLoss] = field(default_factory=dict)
    """Of conversations: "first", the first learned turn of each, and "later", all others."""
    kinds: Mapping[str, PartLoss] = field(default_factory=dict)
    """Of conversations: "thought", "call" and "answer" (`chat.marks`); none of data that tell no kinds."""


class HeldoutEvaluator:
    """Evaluates a policy on the held-out split of each source; the same documents each time."""

    def __init__(self, sources: list[Source], bytes_of_token: np.ndarray | None, seq_len: int,
                 rows_per_batch: int, max_tokens: int, world: ParallelWorld) -> None:
        self._bytes = (None if bytes_of_token is None
                       else torch.from_numpy(bytes_of_token).to(get_local_device()))
        self._rows_per_batch = rows_per_batch
        self._batches = {
            source.name: self._load_micro_batches(index, source, seq_len, max_tokens, world)
            for index, source in enumerate(sources) if source.num_tokens.get("heldout", 0) > 1}

    @classmethod
    def of(cls, config: RunConfig, sources: list[Source], max_seq_len: int,
           world: ParallelWorld) -> HeldoutEvaluator:
        """Return the evaluator of a run, whose documents are cut as long as its longest samples."""
        tokenizer = tokenizer_folder(sources)
        sizes = count_token_bytes(tokenizer, config.model.vocab_size) if tokenizer else None
        return cls(sources, sizes, max_seq_len, config.train.micro_batch_size,
                   config.data.heldout_tokens, world)

    def _load_micro_batches(self, index: int, source: Source, seq_len: int, max_tokens: int,
              world: ParallelWorld) -> list[PackedRow]:
        """Return this rank's micro-batches; every rank has the same number,
        the last ones may be padding only."""
        shard = source.open_split("heldout")
        samples = build_heldout_samples(shard, index, seq_len, max_tokens)
        per_round = self._rows_per_batch * world.dp_size
        # every rank runs as many micro-batches, or the collectives of the forward pass would not meet
        samples += [OrderedSample(index, ())] * (-len(samples) % per_round)
        rows = [heldout_row(s, shard, source, seq_len) for s in samples]
        first = world.dp_rank * self._rows_per_batch
        return [join_rows(rows[i:i + self._rows_per_batch]) for i in range(first, len(rows), per_round)]

    @property
    def num_micro_batches(self) -> int:
        """Those of this process, of all sources."""
        return sum(map(len, self._batches.values()))

    def run(self, policy: ForwardModel, around: Around = lambda source, action: action(),
            done: Callable[[], object] = lambda: None) -> dict[str, HeldoutLoss]:
        """Return the result of every source that has held-out targets; called by all processes together.

        Args:
            around: does the forward passes of a source, and may look at the model meanwhile.
            done: called on the last pipeline stage after each micro-batch.
        """
        def sums_of(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
            sums = self._sum_losses(hidden, head, batch)
            done()
            return sums

        results = {}
        for name, rows in self._batches.items():
            micro_batches = [build_micro_batch(r) for r in rows]
            sums = around(name, partial(policy.map, micro_batches, sums_of))
            local = torch.stack(sums).sum(0) if sums else torch.zeros(len(SUMS), dtype=torch.float64)
            reduced = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local.cpu()))
            total = unflatten_tensors(reduced, SUMS)
            if total["tokens"] > 0:  # of prompts alone nothing is learned, and a loss of 0 would look perfect
                results[name] = compute_result({key: float(value) for key, value in total.items()})
        return results

    def _sum_losses(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        losses = -head.logprobs(hidden[0], batch.labels).double()
        counted = (batch.weights > 0).double()
        if self._bytes is None:
            # no tokenizer, no bytes: NaN goes through the sums, so that bits per byte are NaN too
            size_bytes = torch.full_like(losses, math.nan)
        else:
            size_bytes = self._bytes[batch.labels].double()
        accepted, drafts = losses.new_zeros(2)
        if len(hidden) > 1:
            accepted, drafts = _count_accepted_drafts(hidden, head, batch)
        sums = {"nats": (losses * counted).sum(), "tokens": counted.sum(),
                "size_bytes": (size_bytes * counted).sum(), "accepted": accepted, "drafts": drafts}
        for part, (column, chosen) in PARTS.items():
            of_part = counted * chosen(batch.columns.get(column, torch.zeros_like(losses)))
            sums |= {f"{part}_nats": (losses * of_part).sum(), f"{part}_tokens": of_part.sum()}
        return flatten_tensors({name: sums[name] for name in SUMS})


def heldout_row(sample: OrderedSample, documents: Documents, source: Source, seq_len: int) -> PackedRow:
    """Return held-out documents as a row; of conversations with the columns `TURN` and `KIND`."""
    if source.format != "chat":
        return build_row(sample, documents, seq_len)
    return with_turns(build_row(sample, documents, seq_len, columns=(KIND,)), documents)


def compute_result(sums: Mapping[str, float]) -> HeldoutLoss:
    """Return the means that a source's sums make."""
    nats, size_bytes = sums["nats"], sums["size_bytes"]
    bits_per_byte = nats / math.log(2) / size_bytes if size_bytes else math.nan
    parts = {part: PartLoss(sums[f"{part}_nats"] / tokens, int(tokens))
             for part in PARTS if (tokens := sums[f"{part}_tokens"])}
    return HeldoutLoss(nats / sums["tokens"], bits_per_byte, int(sums["tokens"]),
                       sums["accepted"] / sums["drafts"] if sums["drafts"] else None,
                       turns={part: parts[part] for part in TURNS if part in parts},
                       kinds={part: parts[part] for part in KINDS if part in parts})


def _count_accepted_drafts(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
    """Return [2] float64: how many drafts of the first prediction layer the trunk accepts,
    and how many there are.

    The layer drafts at each place the token after the next one; the trunk chooses that one place further on.
    """
    chosen, drafted = head.predict_row(hidden[0]), head.predict_row(hidden[1])
    counted = shift_labels(batch, 1).weights > 0
    # position t of depth 1 drafts token t + 2, which the trunk chooses at t + 1
    return torch.stack([((drafted == chosen.roll(-1)) & counted).sum(), counted.sum()]).double()
