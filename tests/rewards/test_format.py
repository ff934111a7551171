"""Forms that are asked for, on answers that have them, miss them narrowly, or are hostile."""

from __future__ import annotations

import json

import pytest

from megatron_sov.rewards.reward import Refused
from megatron_sov.rewards.surface import MAX_JSON_CHARS, NO_JSON, Format, json_of, tagged
from megatron_sov.settings import problems_of

TAGS = ("think", "answer")


def reward(response: str, **settings) -> float:
    return Format(**settings).score({"response": response}).reward


@pytest.mark.parametrize(("text", "has_them"), [
    ("<think>why</think><answer>4</answer>", True), (" <think>a < b</think>\n<answer>4</answer>\n", True),
    ("<think>why</think>", False), ("<answer>4</answer><think>why</think>", False),
    ("so: <think>why</think><answer>4</answer>", False), ("<think>why</think><answer>4</answer> done", False),
    ("<think>why</think><answer> </answer>", False), ("<think>a<answer>4</answer></think>", False),
    ("<think>a</think><answer>4</answer><answer>5</answer>", False),
    ("</think><think><answer>4</answer>", False),
    ("<THINK>why</THINK><answer>4</answer>", False),
])
def test_tags_stand_once_in_order_with_nothing_around(text: str, has_them: bool) -> None:
    assert tagged(text, TAGS) is has_them


@pytest.mark.parametrize(("text", "value"), [
    ('{"a": 1}', {"a": 1}), ('```json\n{"a": 1}\n```', {"a": 1}), ("```\n[1]\n```", [1]), ("3", 3),
    ("null", None),
    ("", NO_JSON), ("{'a': 1}", NO_JSON), ('{"a": 1} ok', NO_JSON), ("NaN", NO_JSON),
    ("[" * 100_000, NO_JSON),
    ("[" * 5_000 + "]" * 5_000, NO_JSON), ("1" * 5_000, NO_JSON), ('"\x00"', NO_JSON),
])
def test_json_is_the_whole_response(text: str, value: object) -> None:
    assert json_of(text) == value


def test_json_beyond_the_limit_is_refused() -> None:
    with pytest.raises(Refused, match="at most 1,000,000"):
        json_of(json.dumps("x" * MAX_JSON_CHARS))


def test_checks_are_counted_together() -> None:
    asked = {"json_keys": ("a", "b"), "regex": r"\{.*\}"}
    assert reward('{"a": 1,\n"b": 2}', **asked) == 1.0
    assert reward('{"a": 1}', **asked) == 0.0
    assert reward('{"a": 1}', **asked, all_or_nothing=False) == pytest.approx(2 / 3)


def test_a_pattern_has_to_match_the_whole_response() -> None:
    assert reward(" The answer is 4. ", regex=r"The answer is \d+\.") == 1.0
    assert reward("The answer is 4. Or 5.", regex=r"The answer is \d+\.") == 0.0


@pytest.mark.parametrize(("settings", "problem"), [
    ({}, "nothing is asked for"), ({"regex": "("}, 'regex = "(" is no regular expression'),
    ({"tags": ("a b",)}, 'tags.0 = "a b" must be a name')])
def test_settings_that_make_no_sense(settings: dict, problem: str) -> None:
    assert problem in str(problems_of(Format(**settings))[0])
