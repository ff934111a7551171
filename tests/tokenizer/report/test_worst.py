"""Inputs that may be slow, on a clock that only the tokenizer moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tokenizer.report import command
from tokenizer.report.command import LIMIT_S, MEASURABLE_S, Timed, check_worst, time_input, worst_inputs

Toy = Callable[..., Any]
Costs = Callable[[str], float]


class Timer:
    """Gives every text as many tokens as letters, and takes the time that a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.costs_s, self.sizes = 0.0, (lambda text: 0.0), list[int]()
        monkeypatch.setattr(command, "SIZE_BYTES", 10_000)  # of the noise
        monkeypatch.setattr(command, "time", SimpleNamespace(process_time=lambda: self.now_s))

    def encode(self, text: str) -> list[int]:
        self.sizes.append(len(text.encode()))
        self.now_s += self.costs_s(text)
        return [0] * len(text)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Any:
    return Timer(monkeypatch)


def test_sizes_grow_fourfold_up_to_the_asked_one_and_characters_stay_whole(timer: Any) -> None:
    timer.costs_s = lambda text: 1e-6 * len(text.encode())
    found = time_input(timer, "가나", 64_000)
    assert found.sizes_bytes == timer.sizes == [999, 3_999, 15_999, 63_999]
    assert found.times_s == pytest.approx([1e-6 * size for size in found.sizes_bytes])
    assert found.num_tokens == 21_333 and found.error == ""


@pytest.mark.parametrize(("power", "scale_s"), [(1.0, 1e-6), (2.0, 1e-11), (1.5, 1e-8)])
def test_the_power_of_growth_is_found(power: float, scale_s: float, timer: Any) -> None:
    timer.costs_s = lambda text: scale_s * len(text) ** power
    assert time_input(timer, "a").exponent == pytest.approx(power, abs=1e-6)


def test_short_times_say_nothing_and_one_size_neither() -> None:
    assert Timed([1, 4], [0.01, MEASURABLE_S * 0.9], 1, "").exponent is None
    assert Timed([4], [10.0], 1, "").exponent is None
    assert Timed([1_000_000], [2.0], 1, "").mb_per_s == 0.5


def test_a_size_that_would_take_too_long_is_not_tried(timer: Any) -> None:
    timer.costs_s = lambda text: LIMIT_S / 10 * (len(text) / 62_500) ** 2  # 2 s for 1/16: 1/4 may take 32 s
    found = time_input(timer, "a", 1_000_000)
    assert found.sizes_bytes == [15_625, 62_500] and found.exponent == pytest.approx(2)


def test_what_the_library_says_where_it_gives_up_is_kept_and_the_readers_ctrl_c_is_not(timer: Any) -> None:
    class Panic(BaseException):
        pass

    def wants_rollback(text: str) -> float:
        if len(text) > 500_000:
            raise timer.problem
        return 1.0

    timer.costs_s, timer.problem = wants_rollback, Panic("stack\n  overflow")
    found = time_input(timer, "a")
    assert found.error == "Panic at 1,000,000 bytes: stack overflow" and len(found.times_s) == 3
    timer.problem = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        time_input(timer, "a")


def check(timer: Any, costs_s: Costs) -> Any:
    timer.costs_s = costs_s
    told: list[int] = []
    found = check_worst(timer, told.append, 10_000)
    assert told == [1] * len(worst_inputs()) and list(found.numbers["inputs"]) == list(worst_inputs())
    return found


def test_linear_time_is_good_and_the_slowest_input_is_named(timer: Any) -> None:
    found = check(timer, lambda text: 1e-4 * len(text.encode()) * (2 if "7" in text[:1] else 1))
    assert found.verdict == "good"
    assert found.summary == "slowest: digits, 0.01 MB per CPU second; time grows with the text"


def test_steep_growth_is_bad_once_it_came_twice(timer: Any) -> None:
    steep = check(timer, lambda text: 1e-7 * len(text) ** 2 if text[0] == "!" else 1e-4 * len(text.encode()))
    assert steep.verdict == "bad" and "time grows faster than the text for punctuation" in steep.summary
    seen: list[int] = []

    def held_up(text: str) -> float:
        """Take ten times as long for the largest size of punctuation, the first time only."""
        if text[0] == "!" and len(text) == 10_000:
            seen.append(len(text))
        return 1e-4 * len(text.encode()) * (10 if len(seen) == 1 and text[0] == "!" and len(text) == 10_000
                                            else 1)

    assert check(timer, held_up).verdict == "good" and len(seen) == 2


def test_what_fails_and_what_stopped_early_is_bad(timer: Any) -> None:
    def costs_s(text: str) -> float:
        if text[0] == "\t":
            raise RuntimeError("no tabs")
        return LIMIT_S if text[0] == " " else 0.001

    found = check(timer, costs_s)
    assert found.verdict == "bad"
    assert found.summary.endswith("; stopped early: spaces; fails on tabs")
    rows = {row[0]: row for row in found.tables[0].rows}
    assert rows["tabs"] == ["tabs", "–", "0", "–", "–", "RuntimeError at 156 bytes: no tabs"]
