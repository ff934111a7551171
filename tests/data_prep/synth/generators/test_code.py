"""Generator `code`: programs and tests vote, tests notice stubs and planted mistakes, nothing reaches out."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import generator, samples_of, wrongly_judged

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.code import CodeSettings, agreement, fails, killed, passed, telling
from data_prep.synth.generators.code_parts import (
    CodeTask, assertions, defines, mutants, parsed, reaches_out, read_task, stubs)
from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.reward import Score

ENDLESS = ("tests that never end", "programs that never end", "a program that never ends beside right ones",
           "programs that are wrong each in its way", "tests by type alone", "tests whose values are wrong",
           "a test that says nothing beside the right ones", "one test", "right",
           "tests that accept all but nothing")
"""Sorts of cases that take long, or that smaller tests here have; the benchmark has all."""
HEAD = "```python\ndef double(x: int) -> int:\n    \"\"\"Return twice x.\"\"\"\n```"
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(3) == 6", "assert double(0) == 0", "assert double(-4) == -8", "assert double(1) == 2",
         "assert double(50) == 100"]


def test_planted_cases_are_told_apart() -> None:
    assert wrongly_judged("code", *ENDLESS, num_solutions=3, num_test_draws=2, max_mutants=2) == []


def test_a_task_becomes_a_prompt_with_tests_and_conversations() -> None:
    def replies(request: Any) -> Any:
        system = request["messages"][0]["content"]
        if "write tests" in system:
            return "```python\n" + "\n".join([*TESTS, "assert double(2) == 5"]) + "\n```"
        said = ("Twice is two times.", "Add it to itself, since that is what doubling means here.")
        body = ("2 * x", "x + x")
        way = request["seed"] % 2
        return {"content": f"{said[way]}\n```python\ndef double(x):\n    return {body[way]}\n```",
                "reasoning_content": "Easy."}

    item = GeneratorItem("double", {"task": f"Double a number.\n{HEAD}", "entry_point": "", "seed": ""})
    prompt, *chats = samples_of(generator("code", num_solutions=4, max_mutants=3), item, replies)
    assert prompt.reason == "" and prompt.record == {
        "prompt": f"Double a number.\n{HEAD}", "tests": TESTS, "entry_point": "double"}
    assert prompt.notes["num_tests"] == 6 and prompt.notes["num_agreed"] == 5
    assert {chat.kind for chat in chats} == {"chat"} and prompt.kind is None
    assert sorted(chat.reason for chat in chats) == ["", "", "different", "different"]
    assert chats[0].record["messages"][1]["reasoning_content"] == "Easy."


def test_programs_and_tests_that_agree_best_are_taken() -> None:
    """Two programs pass the first three tests, three pass none but the last: 2 x 3 is more than 3 x 1."""
    matrix = [[True, True, True, False]] * 2 + [[False, False, False, True]] * 3
    found = agreement(matrix)
    assert found.programs == (0, 1) and found.tests == (0, 1, 2)
    assert agreement([]).programs == () and agreement([[]]).tests == ()


def test_tests_that_a_stub_passes_as_well_say_nothing() -> None:
    code = CodeReward(test_time_s=3.0)
    loose = ["assert double(1) == double(1)", "assert double(2) is double(2) or double(2) == double(2)"]
    kept, blind = telling(code, "double", [*TESTS, *loose])
    assert kept == TESTS and blind == ""
    assert telling(code, "double", ["assert double(0) == 0"])[1] == stubs("double")[1]
    assert fails(code, stubs("double")[0], TESTS) and not fails(code, RIGHT, TESTS)


def test_mutants_are_noticed_by_good_tests_and_pass_weak_ones() -> None:
    program = "def sign(x):\n    if x > 0:\n        return 1\n    return -1 if x < 0 else 0\n"
    strong = [f"assert sign({x}) == {(x > 0) - (x < 0)}" for x in (-2, -1, 0, 1, 2)]
    code = CodeReward(test_time_s=3.0)
    assert killed(code, program, strong, 8) == (8, 8)
    assert killed(code, program, ["assert sign(5) == 1"], 8)[0] < 8


def test_a_test_behind_one_that_never_ends_is_run_by_itself() -> None:
    class Slow(CodeReward):
        """As `CodeReward`, where a test that holds `endless` takes all the time that there is."""

        def passed(self, row: Any) -> list[bool]:
            place = next((i for i, test in enumerate(row["tests"]) if "endless" in test), len(row["tests"]))
            return ["wrong" not in test and i < place for i, test in enumerate(row["tests"])]

        def score_unproved(self, row: Any) -> Score:
            (test,) = row["tests"]
            return Score(float("right" in test), timed_out="endless" in test)

    tests = ["right", "wrong", "endless", "right", "wrong", "right"]
    assert passed(Slow(), RIGHT, tests) == [True, False, False, True, False, True]
    assert passed(Slow(), RIGHT, ["endless"] * 5 + ["right"]) == [False] * 6


def test_mutants_differ_in_one_place_and_are_the_same_each_time() -> None:
    program = ('def f(values: list[int] = [1]) -> int:\n    """Doc 1."""\n'
               '    return max(values) - 3 if values else -1\n')
    found = mutants(program, 100)
    assert found == mutants(program, 100) and mutants(program, 2) == found[:2]
    assert len(set(found)) == len(found) > 6 and ast.unparse(ast.parse(program)) not in found
    assert all('"""Doc 1."""' in text and "list[int]" in text for text in found)
    assert any("max(values) + 3" in text for text in found)


@pytest.mark.parametrize(("text", "found"), [
    (f"Double it.\n{HEAD}", "double"), ("Double it.", None),
    ("```python\ndef a(): ...\ndef b(): ...\n```", None),
    ("```python\ndef a(x, y=1): ...\n```", "a"), ("```python\ndef a(x):\n    return x\n```", None),
    ("```python\ndef a(x):\n```", "a"), ("```python\n1 +\n```", None), ("", None), ("x" * 30_000, None),
])
def test_a_task_has_one_function_without_its_body(text: str, found: str | None) -> None:
    task = read_task(text)
    assert (task.entry_point if isinstance(task, CodeTask) else None) == found


def test_assertions_are_those_that_call_the_function() -> None:
    text = ("```python\nimport os\nassert f(1) == 2, 'one'\nassert f(1)==2\nassert g(1) == 2\nassert True\n"
            "assert (f(1), 'always')\nassert f(2) == 3 or True\ndef test(): assert f(9) == 1\n"
            "for i in []: assert f(i)\nassert [f(x) for x in (1, 2)] == [2, 3]\n```\n"
            "```python\nassert f(4) == 5\nassert f(5) ==\nassert f(6) == 7\n```\nassert f(7) == 8")
    assert list(assertions(text, "f")) == [
        "assert f(1) == 2", "assert [f(x) for x in (1, 2)] == [2, 3]", "assert f(4) == 5", "assert f(6) == 7"]


@pytest.mark.parametrize(("source", "found"), [
    ("import math, heapq\nfrom collections import deque\ndef f(): return deque()", ""),
    ("import os", "imports os"), ("from subprocess import run", "imports subprocess"),
    ("from . import x", "imports ."), ("open('x')", "uses open"), ("x = eval", "uses eval"),
    ("().__class__.__bases__", "uses __bases__"), ("import datetime\ndatetime.now()", "uses now"),
    ("def f(:", "is no Python"), ("x = " + "+".join("1" * 3000), "is no Python"),
    ("import random", "imports random"),
])
def test_programs_reach_for_nothing(source: str, found: str) -> None:
    assert reaches_out(source) == found


def test_a_deep_program_is_refused_and_not_walked() -> None:
    assert parsed("x = " + "-" * 5000 + "1") is None
    assert list(assertions(f"```python\nassert f({'-' * 500}1)\n```", "f")) == []


def test_the_function_stands_at_the_top() -> None:
    assert defines("def f(): pass", "f") and defines("f = max", "f")
    assert not defines("class A:\n    def f(self): pass", "f") and not defines("def g(): pass", "f")


def test_input_is_a_task_or_a_seed(tmp_path: Path) -> None:
    from megatron_sov.base.errors import UserError

    (tmp_path / "in.jsonl").write_text('{"seed": "gears"}\n{"text": "a snippet"}\n{"seed": "gears"}\n')
    items = list(generator("code").items([tmp_path / "in.jsonl"]))
    assert [item.fields["seed"] for item in items] == ["gears", "a snippet"]
    (tmp_path / "in.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match=r"in.jsonl:1: has neither a task nor a seed"):
        list(generator("code").items([tmp_path / "in.jsonl"]))


def test_all_problems_of_settings_are_told() -> None:
    assert keys_of(CodeSettings(min_killed=2, test_time_s=0)) == ["min_killed", "test_time_s"]
    assert keys_of(CodeSettings(num_solutions=1, min_tests=40)) == ["min_tests", "min_solutions"]
