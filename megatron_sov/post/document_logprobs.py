"""Log-probabilities of the tokens of whole documents, at whatever layout the model lives in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.data.order import OrderedSample
from megatron_sov.engine.data.rows import join_rows, rows_per_micro_batch, sample_row
from megatron_sov.engine.data.streams import PackedSegment, Row, best_fit
from megatron_sov.engine.mcore.decode.forward_only import ForwardModel
from megatron_sov.engine.mcore.model.logprobs import Head
from megatron_sov.engine.mcore.parallel import collectives
from megatron_sov.engine.mcore.parallel.world import ParallelWorld
from megatron_sov.eval.heldout import row_losses
from megatron_sov.train.objectives.microbatch import MicroBatch, from_row

if TYPE_CHECKING:
    from megatron_sov.engine.data.token_shards import Documents


MICRO_BATCHES = 8
"""Those of a process that are passed through the model at a time."""


class RunningLogprobs(Protocol):
    """A model that runs on all processes together."""

    @property
    def policy(self) -> ForwardModel:
        """Forward only."""
        ...

    @property
    def world(self) -> ParallelWorld:
        """This process's place."""
        ...


def document_logprobs(model: RunningLogprobs, documents: Documents, chosen: range, seq_len: int,
                      rows_per_batch: int, temperature: float = 1.0,
                      routes: RouteShape | None = None) -> np.ndarray:
    """Return [tokens of the documents] float32, document after document, on every process.

    Each is log p(token | those before it); 0 for first tokens and for what lies beyond the longest sample.

    Args:
        model: what is asked; called by all of its processes together.
        documents: those of a split.
        chosen: which of them.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: rows of a micro-batch at most.
        temperature: what logits are divided by before the softmax.
        routes: shape of the documents' routes, which are replayed; None: each token goes where it goes.
    """
    whole = rows_per_batch * model.world.dp_size

    def of_rows(rows: list[Row]) -> np.ndarray:
        size = rows_per_micro_batch(len(rows), rows_per_batch, model.world.dp_size)
        filled = [*rows, *[()] * (-len(rows) % (size * model.world.dp_size))]
        return _of_rows(model, documents, filled, seq_len, size, temperature, routes)

    return _placed(documents, chosen, seq_len, whole * MICRO_BATCHES, of_rows)


def document_logprobs_hf(model: Any, documents: Documents, chosen: range, seq_len: int) -> np.ndarray:
    """Return what `document_logprobs` gives, of transformers' model."""
    return _placed(documents, chosen, seq_len, 1, lambda rows: np.stack([
        -row_losses(model, sample_row(OrderedSample(0, row), documents, seq_len)) for row in rows]))


def _placed(documents: Documents, chosen: range, seq_len: int, at_a_time: int,
            of_rows: Callable[[list[Row]], np.ndarray]) -> np.ndarray:
    """Return the numbers of documents from those of the rows that they are put into.

    Args:
        documents: those of a split.
        chosen: which of them.
        seq_len: tokens of a row.
        at_a_time: rows that `of_rows` is asked for at most.
        of_rows: rows -> [at least as many, seq_len] log p(label) of each place.
    """
    lengths = np.asarray(documents.lengths[np.asarray(chosen)])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    rows = best_fit([PackedSegment(d, 0, min(n, seq_len))
                     for d, n in zip(chosen, lengths.tolist(), strict=True) if n > 1], seq_len)
    numbers = np.zeros(starts[-1], np.float32)
    for begin in range(0, len(rows), at_a_time):
        there = rows[begin:begin + at_a_time]
        for row, found in zip(there, of_rows(there), strict=False):
            at = 0
            for document, start, count in row:
                place = document - chosen.start
                # a document that goes on behind the row has one label more: the token outside of it
                labels = min(count, int(lengths[place]) - start - 1)
                to = starts[place] + start + 1
                numbers[to:to + labels] = found[at:at + labels]
                at += count
    return numbers


def _of_rows(model: RunningLogprobs, documents: Documents, rows: list[Row], seq_len: int, size: int,
             temperature: float, routes: RouteShape | None) -> np.ndarray:
    """Return [rows, seq_len] float32: log p(label) of each place, on every process."""
    world = model.world
    groups = [rows[i:i + size] for i in range(0, len(rows), size)]
    own = [from_row(join_rows([sample_row(OrderedSample(0, row), documents, seq_len, routes=routes)
                               for row in group]))
           for group in groups[world.dp_rank::world.dp_size]]
    values = torch.zeros(len(groups), size * seq_len, dtype=torch.float64)
    if found := model.policy.map(own, partial(_logprobs, temperature)):
        values[world.dp_rank::world.dp_size] = torch.stack(found).double().cpu()
    summed = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values))
    return summed.float().numpy().reshape(len(rows), seq_len)


def _logprobs(temperature: float, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
    return head.logprobs(hidden[0], batch.labels, temperature)
