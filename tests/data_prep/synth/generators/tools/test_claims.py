"""Numbers and codes that a model says must come from somewhere."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.tools.trajectories import unfounded

TOLD = ["I am mina@example.com, from 2026-06-10.", '{"id": "B12", "price": 1100, "nights": 2, "fee": 0.5}']


@pytest.mark.parametrize("said", [
    "B12 is booked.", "b12 is yours.", "It costs 1,100.", "It is 2,200 for both nights.", "The fee is 0.5.",
    "You have 3 books.", "From the 10th of June 2026.", "2026-06-10 it is.", "It is 1100.5 with the fee.",
    "2200원입니다", "Good morning!"])
def test_what_was_told_or_follows_from_two_numbers_is_founded(said: str) -> None:
    assert unfounded([said], TOLD) == []


@pytest.mark.parametrize("said, wanted", [
    ("B13 is booked.", ["B13"]), ("Your code is V-4711.", ["V-4711"]), ("It costs 999.", ["999"]),
    ("It costs 1,101.", ["1101"]), ("Until 2026-07-31", ["31"]), ("B12 costs 1100, B14 costs 77",
                                                                 ["B14", "77"])])
def test_what_nobody_told_is_not(said: str, wanted: list[str]) -> None:
    assert unfounded([said], TOLD) == wanted
