"""The reward `constraint`: by the functions of its row."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from megatron_sov.rewards.constraint import Constraint, views_of
from megatron_sov.rewards.reward import judged
from megatron_sov.settings import problems_of

NO_COMMA = "def evaluate(response):\n    return ',' not in response"
SHORT = "def evaluate(response):\n    return len(response) < 20"
TRUE = "def evaluate(response):\n    return True"
BROKEN = "def evaluate(response):\n    return response[1000] == 'x'"


@pytest.mark.parametrize(("response", "functions", "settings", "reward"), [
    ("no comma", [NO_COMMA, SHORT], {}, 1.0),
    ("one, comma", [NO_COMMA], {}, 0.0),
    ("one, comma", [NO_COMMA, SHORT], {}, 1.0),  # half of them is enough
    ("one, comma", [NO_COMMA, SHORT], {"min_share": 1.0}, 0.0),
    ("one, comma", [NO_COMMA, SHORT], {"give_share": True}, 0.5),
    ("one, comma that goes on for long", [NO_COMMA, SHORT, TRUE], {}, 0.0),
    ("one, comma that goes on for long", [NO_COMMA, SHORT, TRUE], {"min_share": 0.0}, 1.0),
    ("no comma", [BROKEN, BROKEN, NO_COMMA], {}, 0.0),  # what gives no verdict accepts nothing
    ("hm, hm</think>no comma", [NO_COMMA], {}, 1.0),
    ("hm, hm</think>no comma", [NO_COMMA], {"hide_thinking": False}, 0.0),
    ("  \n ", [TRUE], {}, 0.0),  # nothing keeps nothing
    ("  \n ", [TRUE], {"give_share": True}, 0.0),
])
def test_reward(response: str, functions: list[str], settings: dict[str, Any], reward: float) -> None:
    result = judged(Constraint(**settings), {"response": response, "functions": functions})
    assert (result.status, result.reward) == ("scored", reward)


@pytest.mark.parametrize(("row", "reason"), [
    ({}, "has no 'response'"),
    ({"response": "x"}, "functions = None must be a list"),
    ({"response": "x", "functions": []}, "must be a list"),
    ({"response": "x", "functions": [3]}, "functions[0] = 3 must be a text"),
    ({"response": "x", "functions": [TRUE, "import os"]}, "functions[1] has no function evaluate"),
    ({"response": "x" * 400_001, "functions": [TRUE]}, "at most 400,000"),
])
def test_a_row_that_cannot_be_judged_is_refused(row: dict[str, Any], reason: str) -> None:
    result = judged(Constraint(), row)
    assert result.status == "refused"
    assert reason in result.reason


def test_settings_are_checked_together() -> None:
    assert [problem.key for problem in problems_of(Constraint(min_share=2, call_time_s=0.1))] == [
        "min_share", "call_time_s"]
    assert "pip install pythainlp" in str(problems_of(Constraint(segmenter="pythainlp"))[0])


def test_views_are_those_of_typhoon_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert views_of("a b\nc", "none") == ["a b\nc"]
    assert views_of("a b\nc", "rules") == ["a b\nc", "a b. c", "a b c"]
    assert views_of("one", "rules") == ["one"]
    library = types.ModuleType("pythainlp")
    library.sent_tokenize = lambda text: text.split("|")  # type: ignore[attr-defined]
    library.word_tokenize = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pythainlp", library)
    assert views_of("ab|cd", "pythainlp") == ["ab|cd", "ab.cd", "a b.c d"]
