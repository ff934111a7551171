"""Documents of any length through a policy: packed into rows, rows shared out over the data-parallel processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_sov.mcore import cpu, schedule
from megatron_sov.mcore.policy import Inputs, Policy

ROW_TOKENS = 8192
"""Tokens of a row, unless one document alone is longer; bounds the memory of a forward pass."""
Tokens = Sequence[int]


def rows_of(lengths: Sequence[int], row_tokens: int = ROW_TOKENS) -> list[list[int]]:
    """Return the documents (by index, in order) of each row; a row ends where the next document would not fit."""
    rows: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not rows or filled + length > row_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += length
    return rows


def next_tokens(policy: Policy, documents: Sequence[Tokens], last: int = 1) -> torch.Tensor:
    """Return the most probable token after each of the last `last` positions of every document.

    Called by all processes together; every one gets the same result.

    Args:
        policy: the model.
        documents: at least `last` tokens each; they do not see one another.
        last: how many positions at the end of each document.

    Returns:
        [documents, last] int64.
    """
    return _at_ends(policy, documents, last, policy.top_tokens, 1)[:, :, 0].long()


def next_logits(policy: Policy, documents: Sequence[Tokens]) -> torch.Tensor:
    """Return the logits [documents, vocabulary] float64 after each document, the same on every process."""
    return _at_ends(policy, documents, 1, policy.logits, policy.model.vocab_size)[:, 0]


def _at_ends(policy: Policy, documents: Sequence[Tokens], last: int, read: Callable[[Inputs, torch.Tensor], torch.Tensor],
             width: int) -> torch.Tensor:
    """Return [documents, last, width] float64: what `read` gives at the last positions of each document.

    Each document is computed by one data-parallel process and then sent to all, so that all decide alike.
    """
    rank, size = schedule.data_place()
    rows = rows_of([len(d) for d in documents])
    rows += [[]] * (-len(rows) % size)  # processes that share experts must run forward equally often
    found = torch.zeros(len(documents), last, width, dtype=torch.float64)
    for row in rows[rank::size]:
        batch = Inputs([documents[i] for i in row] or [[0]], cpu.device())
        ends = batch.ends[:len(row)]
        positions = (ends[:, None] - torch.arange(last - 1, -1, -1)).flatten() if row else batch.ends
        values = read(batch, positions)
        if row:
            found[row] = values.double().reshape(len(row), last, width)
    return schedule.sum_over_data(found)
