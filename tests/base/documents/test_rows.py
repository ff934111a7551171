"""Read rows of JSONL files, account for records, and choose training data from judged groups."""

import math
from itertools import product
from pathlib import Path

import pytest

from megatron_sov.base.documents.accounting import RecordAccount, RecordTally
from megatron_sov.base.documents.groups import are_equal, choose_pair, compute_group_advantages, should_train
from megatron_sov.base.documents.rows import check_rows, iter_changes, read_rows
from megatron_sov.base.errors import UserError


def test_rows_may_be_any_objects(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": "4"}\n\n{}\n')
    assert check_rows(file, "--tests", "") == 2
    assert list(read_rows(file, "--tests", "")) == [(1, {"answer": "4"}), (3, {})]
    with pytest.raises(UserError, match="line 1: has no 'prompt'"):
        check_rows(file, "--tests", "prompt")
    file.write_text("[]\n")
    with pytest.raises(UserError, match="line 1: is not a JSON object, but a list"):
        check_rows(file, "--tests", "")
    file.write_text("\n")
    with pytest.raises(UserError, match=r"has no rows; each line is a JSON object$"):
        check_rows(file, "--tests", "")


def test_changed_values_have_dotted_names() -> None:
    old_settings = {"settings": {"min_score": 0.5, "keep": ["ko"]}, "version": 1, "old": 1}
    new_settings = {"settings": {"min_score": 0.6, "keep": ["ko"]}, "version": 1}
    assert list(iter_changes(old_settings, new_settings)) == [
        ("settings.min_score", "0.5", "0.6"), ("old", "1", "null")]


@pytest.mark.each(("account", "line"), [
    (RecordAccount(0, 0), "0 records read: 0 written, 0 set aside"),
    (RecordAccount(1200, 1200, {"json": 0}), "1,200 records read: 1,200 written, 0 set aside"),
    (RecordAccount(8, 2, {"a": 1, "json": 4, "b": 1}),
     "8 records read: 2 written, 6 set aside (4 json, 1 a, 1 b)"),
    (RecordAccount(2, 1, {"a\x1b": 1}, "rows", "scored"), "2 rows read: 1 scored, 1 set aside (1 a\\x1b)"),
])
def test_account_sentence(account: RecordAccount, line: str) -> None:
    assert account.describe() == line


@pytest.mark.each(("num_read", "num_written", "aside"), [
    (1, 0, {}), (0, 1, {}), (3, 1, {"json": 1}), (3, 1, {"json": 3}), (2, 2, {"json": 1, "empty": 0})])
def test_unbalanced_account_raises(num_read: int, num_written: int, aside: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match=f"add up: {num_read} records read: {num_written} written"):
        RecordAccount(num_read, num_written, aside)
    tally = RecordTally(num_read, num_written)
    tally.set_aside.update(aside)
    with pytest.raises(RuntimeError, match="account of rows does not add up"):
        tally.account("rows")


def test_pair_has_best_ended_and_worst_response() -> None:
    texts = "abab"
    for rewards in product((0.0, 0.5, 1.0), repeat=4):
        for ended in product((True, False), repeat=4):
            pair, passed_over = choose_pair(rewards, ended, lambda i, j: texts[i] == texts[j])
            worst = rewards.index(min(rewards))
            ended_indices = [i for i in range(4) if ended[i]]
            best = max(ended_indices, key=lambda i: (rewards[i], -i), default=worst)
            has_pair = rewards[best] > rewards[worst] and texts[best] != texts[worst]
            assert pair == ((best, worst) if has_pair else None)
            # a better one that did not end
            assert passed_over == (not any(ended[i] for i in range(4) if rewards[i] == max(rewards)))


def test_group_advantages_follow_k_exaone() -> None:
    assert compute_group_advantages([3.0, 1.0, 2.0, 1.5]) == pytest.approx([1.0, -1.0, 0.0, -0.5])
    # a good response that did not end, alone, is not learned
    assert not should_train(1.0, False) and not should_train(0.5, False) and should_train(1.0, True)
    assert should_train(0.0, False) and should_train(-1.0, False)


ROUNDED_PAIRS = [(0.1 + 0.2 + 0.3, 0.6), (0.1 + 0.2, 0.3), (0.7 + 0.1, 0.8), (1.1 + 2.2, 3.3), (0.1 * 3, 0.3),
            (sum([0.1] * 10), 1.0), (1e9 * (0.1 + 0.2), 3e8), (-0.1 - 0.2, -0.3), (1e-17, 0.0), (5.0, 5.0)]
"""Two rewards that differ by the rounding of floats, if at all."""
DIFFERENT_PAIRS = [(0.6, 0.60001), (0.0, 1e-6), (1.0, -1.0), (1e9, 1e9 + 1e3), (3, 4), (-1e-3, 1e-3)]


@pytest.mark.each(("first", "second", "equal"), [*((*pair, True) for pair in ROUNDED_PAIRS),
                                                        *((*pair, False) for pair in DIFFERENT_PAIRS)])
def test_rounding_is_not_a_preference(first: float, second: float, equal: bool) -> None:
    for rewards in ((first, second), (second, first)):
        assert are_equal(rewards) is equal
        assert (choose_pair(rewards, (True, True), lambda i, j: False)[0] is None) is equal
    # the first of equal responses is taken, and a truncated one is passed over only for a better reward
    low = min(first, second) - 10 * abs(first) - 1
    best = 0 if equal or first > second else 1
    assert choose_pair((first, second, low), (True,) * 3, lambda i, j: False) == ((best, 2), 0)
    assert choose_pair((first, second, low), (False, True, True), lambda i, j: False) == (
        (1, 2), int(first > second and not equal))


def test_rounding_does_not_make_a_good_response() -> None:
    rewards = [0.0, math.fsum((0.1, 0.2)), 0.1 + 0.2 + 0.3]
    for order in ((0, 1, 2), (2, 1, 0)):
        advantages = compute_group_advantages([rewards[i] for i in order])
        assert advantages[1] == pytest.approx(0) and should_train(advantages[1], False)
    assert should_train(4e-16, False) and not should_train(1e-3, False)
