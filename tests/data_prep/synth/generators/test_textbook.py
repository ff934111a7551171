"""Lessons with exercises: what is kept, and why other lessons are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, build, first_reason, one_of_each
from scripted import ScriptedAsk, samples_of

CASES = one_of_each("textbook")
REASONS = {
    "a sound lesson": "", "a wrong year": "numbers", "a wrong count": "numbers", "another founder": "names",
    "a copy": "copied", "another language": "language", "one section": "sections",
    "an empty section": "sections", "too few exercises": "number of exercises",
    "an exercise with a wrong answer": "judge: exercise",
    "an exercise that the lesson does not answer": "exercise", "an order that was followed": "exercise",
    "cut off": "complete", "no form": "form", "an exercise without an answer": "form",
    "the contrary, without a name or a number": "judge: faithful"}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    assert first_reason(build("textbook"), CASES[what]) == REASONS[what]


def test_a_lesson_is_one_text_with_its_exercises() -> None:
    sample, = samples_of(build("textbook"), CASES["a sound lesson"].item, actor("textbook").reply)
    text = sample.record["text"]
    assert text.startswith("# ") and text.count("\n## ") == 2 and text.count("\n→ ") == 3


def test_the_level_is_what_is_asked_for() -> None:
    asked = {}
    for level in ("children", "school", "university"):
        ask = ScriptedAsk(actor("textbook").reply)
        list(build("textbook", level=level).make(CASES["a sound lesson"].item, ask))
        asked[level] = ask.requests[0]["messages"][1]["content"]
    assert "children of ten" in asked["children"] and "secondary school" in asked["school"]
    assert "students of a university" in asked["university"]
