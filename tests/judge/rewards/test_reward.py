"""Results of rewards: each row gets a status, and an error gives no reward instead of 0."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest

from megatron_sov.judge.rewards.reward import (
    Refused, Result, Score, get_content, get_text, merge_repeated_results, run_reward, to_result)
from megatron_sov.judge.rewards.scoring import MAX_EXAMPLES, ScoringTally


class FixedReward:
    """A reward that returns `outcome`, or raises it if it is an exception."""

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome

    def score(self, row):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


ROW = {"response": "4"}


@pytest.mark.each(("response", "content"), [
    ("It is 4.", "It is 4."), ("<think>3?</think>\nIt is 4.", "It is 4."), ("3?</think>It is 4.", "It is 4."),
    ("<think>It is 4.", ""), ("<|think|>It is 4.", ""),
    ("<|think|>3?<|end|><|begin|>assistant<|content|>It is 4.", "It is 4."),
    ("<think>3?</think>It is 4.<think>5?", "It is 4."),
    ('It is 4.<tool_call>{"name": "f", "arguments": {"a": 5}}</tool_call>', "It is 4."),
    ("<tool_call>5</tool_call>", ""), ("<tool_call>5", ""), ("<tool_call>f<arg_key>5</tool_call>", ""),
    ("<|tool_calls|><|tool_call:begin|>1<|tool_call:name|>f<|tool_call:args|>5<|tool_call:end|>", ""),
])
def test_thoughts_and_calls_are_not_judged(response: str, content: str) -> None:
    assert get_content({"response": response}) == content


@pytest.mark.each(("given", "reward"), [(1, 1.0), (0.25, 0.25), (True, 1.0), (Fraction(1, 4), 0.25),
                                        (Score(0.5, {"right": True}), 0.5)])
def test_numbers_are_scores(given: object, reward: float) -> None:
    result = run_reward(FixedReward(given), ROW)
    assert (result.reward, result.status) == (reward, "scored")


@pytest.mark.each(("given", "status", "reason"), [
    (math.nan, "failed", "nan, which is no finite number"), (math.inf, "failed", "no finite number"),
    (10**400, "failed", "no finite number"), (-1e308, "failed", "may not pass 1e+30"),
    ("1.0", "failed", "'1.0', a str, where a number belongs"), (None, "failed", "None, a NoneType"),
    (1j, "failed", "a complex"), (Score("high"), "failed", "a str"),  # type: ignore[arg-type]
    (Decimal("1"), "failed", "a Decimal"), (KeyError("answer"), "failed", "KeyError: 'answer'"),
    (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
    (RecursionError("too deep"), "failed", "RecursionError: too deep"),
    (Refused("has no 'answer'"), "refused", "has no 'answer'"), (TimeoutError(), "timeout", ""),
    (MemoryError(), "refused", "")])
def test_invalid_values_and_exceptions_leave_no_reward(given: object, status: str, reason: str) -> None:
    result = run_reward(FixedReward(given), ROW)
    assert (result.reward, result.status) == (None, status)
    assert result.reason and reason in result.reason


def test_a_reason_is_one_short_line() -> None:
    reason = run_reward(FixedReward(ValueError("x" * 10_000 + "\nsecond line")), ROW).reason
    assert len(reason) == 300
    assert "\n" not in reason


def test_components_are_plain_json() -> None:
    score = Score(1, {"nan": math.nan, "words": 3, "list": (1, 2.5), "set": {1}, 7: {"a": None},
                      "huge": 10**400})
    assert to_result(score).components == {"nan": None, "words": 3, "list": [1, 2.5], "set": "{1}",
                                           "7": {"a": None}, "huge": None}


def test_different_rewards_for_a_row_are_a_failure() -> None:
    first, second = Result(0.0, "scored"), Result(1.0, "scored")
    assert merge_repeated_results(first, first) == first
    merged = merge_repeated_results(first, second)
    assert merged.status == "failed"
    assert "gave 0, then 1 for the same row under one version" in merged.reason


@pytest.mark.parametrize(("row", "reason"), [({}, "has no 'answer'"),
                                             ({"answer": 4}, "answer = 4 must be text")])
def test_row_with_a_missing_field_is_refused(row: dict, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        get_text(row, "answer")


def test_tally_names_the_first_rows_without_a_reward() -> None:
    tally = ScoringTally()
    assert tally.mean is None and tally.format_counts("rows") == "0 rows"
    for i in range(1, 4):
        tally.add(i / 2, "scored", "", f"line {i}")
    for i in range(4, 2004):
        tally.add(None, "failed", "no judge", f"line {i}")
    assert tally.mean == 1.0
    assert tally.examples[0] == "line 4: failed: no judge" and len(tally.examples) == MAX_EXAMPLES
    assert tally.format_counts("rows") == "2,000 failed, 3 scored rows, mean reward 1.0000"
    without_lines = ScoringTally()
    without_lines.add(None, "timeout")
    assert without_lines.statuses == {"timeout": 1} and without_lines.examples == []
