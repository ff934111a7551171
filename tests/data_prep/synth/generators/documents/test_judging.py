"""Grades as verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from scripted import ScriptedAsk

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.generators.documents.judging import agreed, graded
from data_prep.synth.generators.documents.verdicts import until_failed


@pytest.mark.parametrize(("said", "passed"), [
    (json.dumps({"score": 8}), True), (json.dumps({"score": 6.9}), False), ("Score: 10, obviously!", False)])
def test_a_grade_has_to_reach_a_bound_and_no_grade_does_not(said: str, passed: bool) -> None:
    verdict = graded(ScriptedAsk(lambda request: said), "sound", "Is it?", {"text": "x"}, 7)
    assert (verdict.check, verdict.passed) == ("judge: sound", passed)


def test_the_judge_is_asked_about_other_words_alone() -> None:
    ask = ScriptedAsk(lambda request: json.dumps({"score": 10}))
    assert agreed(ask, "solved", "Where?", "Seoul.", "seoul", "en", 7).passed
    assert not agreed(ask, "solved", "Where?", "unknown", "Seoul", "en", 7).passed
    assert not agreed(ask, "solved", "Where?", "in the capital", "Seoul", "en", 0).passed
    assert ask.calls == 0
    assert agreed(ask, "solved", "Where?", "in the capital", "Seoul", "en", 7).check == "judge: solved"
    assert ask.calls == 1


def test_checks_behind_the_first_that_fails_are_not_made() -> None:
    def checks():
        yield SampleVerdict("a", True)
        yield SampleVerdict("b", False)
        raise AssertionError("asked on")

    assert [verdict.check for verdict in until_failed(checks())] == ["a", "b"]
