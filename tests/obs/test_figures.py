"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from megatron_sov.obs.figures import duration, figure, large, number, size


@pytest.mark.parametrize(("seconds", "text"), [
    (0.25, "0.2 s"), (59.9, "59.9 s"), (75, "1 min 15 s"), (3725, "1 h 2 min"), (90000 * 3, "3 d 3 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(102.65e9, "102.7 B"), (11e12, "11 T"), (1000, "1 K"),
                                             (12, "12")])
def test_large_numbers(value: float, text: str) -> None:
    assert large(value) == text


@pytest.mark.parametrize(("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"),
                                                 (1.5e9, "1.5 GB"), (2e15, "2000.0 TB")])
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_what_is_no_number_is_none() -> None:
    assert number("inf") == math.inf and number("1.5") == 1.5
    assert [figure(number(value)) for value in (None, "x", "nan", 2)] == ["–", "–", "–", "2"]
