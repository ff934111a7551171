"""A mean over seeds and its interval, by the table of Student's t."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from seeds import half_width, over_seeds


def test_three_seeds_have_an_interval_and_one_has_none() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3 ** 0.5, rel=1e-6)
    assert over_seeds([1.0, 2.0, 3.0], "+.2f") == "+2.00 ± 2.48"
    assert over_seeds([0.25], ".1%") == "25.0%"
