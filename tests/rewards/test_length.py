"""DAPO's soft overlong punishment, by its formula."""

from __future__ import annotations

import pytest

from megatron_sov.rewards.reward import Refused
from megatron_sov.rewards.surface import Length, soft_overlong
from megatron_sov.settings import problems_of


@pytest.mark.parametrize(("length", "reward"), [
    (0, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (18_432, -0.5), (20_479, -4095 / 4096), (20_480, -1.0),
    (20_481, -1.0), (10**9, -1.0)])
def test_equation_13_of_dapo(length: int, reward: float) -> None:
    assert soft_overlong(length, 20_480, 4_096) == pytest.approx(reward)
    assert Length().score({"response": "", "num_tokens": length}).reward == pytest.approx(reward)


def test_other_units_are_counted_in_the_response() -> None:
    row = {"response": "one two three four"}
    assert Length(max_length=4, buffer=2, unit="words").score(row).reward == -1.0
    assert Length(max_length=20, buffer=4, unit="characters").score(row).reward == -0.5
    assert Length(max_length=20, buffer=4, min_length=19, unit="characters").score(row).reward == -1.0


@pytest.mark.parametrize("num_tokens", [None, "4", -1, True, 2.5])
def test_tokens_need_their_number(num_tokens: object) -> None:
    with pytest.raises(Refused, match="must be the number of the response's tokens"):
        Length().score({"response": "x", "num_tokens": num_tokens})


def test_settings_that_make_no_sense() -> None:
    assert str(problems_of(Length(max_length=4, buffer=5))[0]) == "buffer = 5 must be at most max_length = 4"
    assert [problem.key for problem in problems_of(Length(max_length=4, buffer=2, min_length=9))] == [
        "min_length"]
