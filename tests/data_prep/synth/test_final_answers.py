"""Final answers: where they stand, and how they are compared."""

from __future__ import annotations

import pytest

from data_prep.synth.final_answers import boxes, check, ends_in_box, way_of


@pytest.mark.parametrize(("text", "found"), [
    ("a \\boxed{1} b \\boxed{\\frac{1}{2}}.", ["\\frac{1}{2}", "1"]), ("none", []), ("\\boxed{1", []),
    ("\\boxed{1} \\boxed{1}", ["1", "1"]), ("\\boxed{}", [""])])
def test_boxes_are_found_from_behind(text: str, found: list[str]) -> None:
    assert boxes(text) == found


@pytest.mark.parametrize(("text", "ends"), [
    ("\\boxed{1}", True), ("$$\n\\boxed{1}.\n$$", True), ("**\\boxed{1}**", True), ("\\boxed{1} cm", False),
    ("\\boxed{1}\n\n2", False), ("\\boxed{ }", False), ("1", False)])
def test_nothing_is_said_behind_the_box(text: str, ends: bool) -> None:
    assert ends_in_box(text) is ends


@pytest.mark.parametrize(("answer", "way"), [
    ("12", "math"), ("\\frac{\\pi}{4}", "math"), ("x^2 + 1", "math"), ("\\sin x", "math"), ("sin(x)", "math"),
    ("B", "stem"), ("12 cm", "stem"), ("3 m/s", "stem"), ("Paris", "stem"), ("서울특별시", "stem"),
    ("12 \\text{ apples}", "stem")])
def test_what_looks_like_mathematics_is_compared_as_such(answer: str, way: str) -> None:
    assert way_of(answer) == way


def test_answers_are_compared_by_value_in_a_process_that_may_be_ended() -> None:
    said = ["0.5", "\\frac{2}{4}", "1/2", "2", "10**10**10", "\\begin{", "0.5"]
    assert check(said, "1/2") == [True, True, True, False, False, False, True]
