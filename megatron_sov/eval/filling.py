"""Documents put together into rows of a bounded length, which bounds the memory of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

ROW_TOKENS = 8192
"""Tokens of a row, unless one document alone is longer."""


def rows_of(lengths: Sequence[int], row_tokens: int = ROW_TOKENS) -> list[list[int]]:
    """Return the documents (by index, in order) of each row; a row ends where the next
    document would not fit."""
    rows: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not rows or filled + length > row_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += length
    return rows
