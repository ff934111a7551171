"""Which learned turn of its conversation a label belongs to, for what is told of first and later ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_sov.base.chat.encode import TYPE_RESPONSE
from megatron_sov.engine.data.rows import PackedRow
from megatron_sov.engine.data.token_shards import Documents

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
        begins = learned.copy()
        begins[1:] &= ~learned[:-1]
        numbers[first:first + end - start - 1] = (begins.cumsum() * learned)[start + 1:]
    return dataclasses.replace(row, columns={**row.columns, TURN: numbers})
