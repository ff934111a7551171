"""Counting verdicts."""

from __future__ import annotations

from megatron_sov.rewards.reward import Result
from megatron_sov.rewards.scoring import MAX_TOLD, Tally


def test_verdicts_are_counted_and_the_first_without_a_reward_are_named() -> None:
    tally = Tally()
    assert tally.mean is None and tally.line("rows") == "0 rows"
    for i in range(1, 4):
        tally.add(Result(i / 2, "scored"), f"line {i}")
    for i in range(4, 2004):
        tally.add(Result(None, "failed", reason="no judge"), f"line {i}")
    assert tally.mean == 1.0 and tally.told[0] == "line 4: failed: no judge" and len(tally.told) == MAX_TOLD
    assert tally.line("rows") == "2,000 failed, 3 scored rows, mean reward 1.0000"


def test_rows_without_a_place_are_counted_alone() -> None:
    tally = Tally()
    tally.add(Result(None, "timeout"))
    assert tally.statuses == {"timeout": 1} and tally.told == []
