"""Log-probabilities of the tokens of whole documents, at whatever layout the model lives in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_sov.data.order import Sample
from megatron_sov.data.packing import Row, Segment, best_fit
from megatron_sov.data.rows import join_rows, sample_row
from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.mcore.parallel import collectives
from megatron_sov.train.microbatch import MicroBatch, from_row

if TYPE_CHECKING:
    from megatron_sov.data.token_shards import Documents
    from megatron_sov.train.gate import GateView

MICRO_BATCHES = 8
"""Those of a process that are passed through the model at a time."""


def document_logprobs(view: GateView, documents: Documents, chosen: range) -> np.ndarray:
    """Return [tokens of the documents] float32, document after document, on every process.

    Each is log p(token | those before it); 0 for first tokens and for what lies beyond the longest sample.

    Args:
        view: the run whose model is asked; called by all of its processes together.
        documents: those of a split.
        chosen: which of them.
    """
    seq_len, size = view.config.data.max_seq_len(), view.config.train.micro_batch_size
    lengths = np.asarray(documents.lengths[np.asarray(chosen)])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    rows = best_fit([Segment(d, 0, min(n, seq_len))
                     for d, n in zip(chosen, lengths.tolist(), strict=True) if n > 1], seq_len)
    numbers = np.zeros(starts[-1], np.float32)
    at_a_time = size * view.world.dp_size * MICRO_BATCHES
    for begin in range(0, len(rows), at_a_time):
        there = rows[begin:begin + at_a_time]
        there += [()] * (-len(there) % (size * view.world.dp_size))
        for row, found in zip(there, _of_rows(view, documents, there, seq_len), strict=True):
            at = 0
            for document, start, count in row:
                place = document - chosen.start
                # a document that goes on behind the row has one label more: the token outside of it
                labels = min(count, int(lengths[place]) - start - 1)
                to = starts[place] + start + 1
                numbers[to:to + labels] = found[at:at + labels]
                at += count
    return numbers


def _of_rows(view: GateView, documents: Documents, rows: list[Row], seq_len: int) -> np.ndarray:
    """Return [rows, seq_len] float32: log p(label) of each place, on every process."""
    size, world = view.config.train.micro_batch_size, view.world
    groups = [rows[i:i + size] for i in range(0, len(rows), size)]
    own = [from_row(join_rows([sample_row(Sample(0, row), documents, seq_len) for row in group]))
           for group in groups[world.dp_rank::world.dp_size]]
    values = torch.zeros(len(groups), size * seq_len, dtype=torch.float64)
    if found := view.policy.map(own, _logprobs):
        values[world.dp_rank::world.dp_size] = torch.stack(found).double().cpu()
    summed = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values))
    return summed.float().numpy().reshape(len(rows), seq_len)


def _logprobs(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
    return head.logprobs(hidden[0], batch.labels)
