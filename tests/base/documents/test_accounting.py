"""An account of records adds up, or its making fails; it is one line of one form."""

from __future__ import annotations

import pytest

from megatron_sov.base.documents.accounting import RecordAccount, RecordTally


@pytest.mark.parametrize(("account", "line"), [
    (RecordAccount(0, 0), "0 records read: 0 written, 0 set aside"),
    (RecordAccount(1200, 1200, {"json": 0}), "1,200 records read: 1,200 written, 0 set aside"),
    (RecordAccount(8, 2, {"a": 1, "json": 4, "b": 1}),
     "8 records read: 2 written, 6 set aside (4 json, 1 a, 1 b)"),
    (RecordAccount(2, 1, {"a\x1b": 1}, "rows", "scored"),
     "2 rows read: 1 scored, 1 set aside (1 a\\x1b)"),
])
def test_an_account_is_one_line(account: RecordAccount, line: str) -> None:
    assert account.describe() == line


@pytest.mark.parametrize(("num_read", "num_written", "aside"), [
    (1, 0, {}), (0, 1, {}), (3, 1, {"json": 1}), (3, 1, {"json": 3}), (2, 2, {"json": 1, "empty": 0})])
def test_numbers_that_do_not_add_up_are_a_defect(num_read: int, num_written: int,
                                                 aside: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match=f"add up: {num_read} records read: {num_written} written"):
        RecordAccount(num_read, num_written, aside)
    tally = RecordTally(num_read, num_written)
    tally.set_aside.update(aside)
    with pytest.raises(RuntimeError, match="account of rows does not add up"):
        tally.account("rows")
