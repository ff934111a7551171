"""Rows of documents."""

from __future__ import annotations

from megatron_sov.eval.heldout import rows_of


def test_rows_hold_documents_in_order_up_to_their_size() -> None:
    assert rows_of([3, 4, 2, 9, 1, 20, 1], row_tokens=9) == [[0, 1, 2], [3], [4], [5], [6]]
    assert rows_of([]) == []
