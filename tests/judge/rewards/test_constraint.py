"""Reward `constraint`: runs the check functions of a row, Python sources that accept or reject a response."""

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_sov.base.settings import find_all_problems
from megatron_sov.judge.rewards.constraint import (
    Constraint, ConstraintVerdict, check_texts, find_check_problem, segment_text)
from megatron_sov.judge.rewards.reward import run_reward
from megatron_sov.sandbox.sandbox import shared_sandbox

NO_COMMA = "def evaluate(response):\n    return ',' not in response"
SHORT = "def evaluate(response):\n    return len(response) < 20"
TRUE = "def evaluate(response):\n    return True"
BROKEN = "def evaluate(response):\n    return response[1000] == 'x'"


@pytest.mark.each(("response", "functions", "settings", "reward"), [
    ("no comma", [NO_COMMA, SHORT], {}, 1.0),
    ("one, comma", [NO_COMMA], {}, 0.0),
    ("one, comma", [NO_COMMA, SHORT], {}, 1.0),  # half of the checks suffices
    ("one, comma", [NO_COMMA, SHORT], {"min_share": 1.0}, 0.0),
    ("one, comma", [NO_COMMA, SHORT], {"give_share": True}, 0.5),
    ("one, comma that goes on for long", [NO_COMMA, SHORT, TRUE], {}, 0.0),
    ("one, comma that goes on for long", [NO_COMMA, SHORT, TRUE], {"min_share": 0.0}, 1.0),
    ("no comma", [BROKEN, BROKEN, NO_COMMA], {}, 0.0),  # a check without a verdict accepts nothing
    ("hm, hm</think>no comma", [NO_COMMA], {}, 1.0),
    ("hm, hm</think>no comma", [NO_COMMA], {"hide_thinking": False}, 0.0),
    ("  \n ", [TRUE], {}, 0.0),  # an empty response satisfies no constraint
    ("  \n ", [TRUE], {"give_share": True}, 0.0),
])
def test_reward(response: str, functions: list[str], settings: dict[str, Any], reward: float) -> None:
    result = run_reward(Constraint(**settings), {"response": response, "functions": functions})
    assert (result.status, result.reward) == ("scored", reward)


@pytest.mark.each(("row", "reason"), [
    ({}, "has no 'response'"),
    ({"response": "x"}, "functions = None must be a list"),
    ({"response": "x", "functions": []}, "must be a list"),
    ({"response": "x", "functions": [3]}, "functions[0] = 3 must be a text"),
    ({"response": "x", "functions": [TRUE, "import os"]}, "functions[1] has no function evaluate"),
    ({"response": "x" * 400_001, "functions": [TRUE]}, "at most 400,000"),
])
def test_invalid_rows_are_refused(row: dict[str, Any], reason: str) -> None:
    result = run_reward(Constraint(), row)
    assert result.status == "refused"
    assert reason in result.reason


def test_settings_are_checked_together() -> None:
    assert [problem.key for problem in find_all_problems(Constraint(min_share=2, call_time_s=0.1))] == [
        "min_share", "call_time_s"]
    assert "pip install pythainlp" in str(find_all_problems(Constraint(segmenter="pythainlp"))[0])


def test_segmented_texts_equal_typhoon_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert segment_text("a b\nc", "none") == ["a b\nc"]
    assert segment_text("a b\nc", "rules") == ["a b\nc", "a b. c", "a b c"]
    assert segment_text("one", "rules") == ["one"]
    library = types.ModuleType("pythainlp")
    library.sent_tokenize = lambda text: text.split("|")  # type: ignore[attr-defined]
    library.word_tokenize = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pythainlp", library)
    assert segment_text("ab|cd", "pythainlp") == ["ab|cd", "ab.cd", "a b.c d"]


TEXTS = ["One line.", "a, b and c", "", "  ", "서울은 한국의 수도입니다.", "ภาษาไทย", "- x\n- y\n- z",
         '"in quotes"', "5 and 7", "a" * 10_000, "\U0001f600", "null\0byte"]
CHECK_SOURCES = [
    "def evaluate(response):\n    return ',' not in response",
    "import re\ndef evaluate(response):\n    return bool(re.search(r'\\d', response))",
    "def evaluate(response: str) -> bool:\n    return all(l.startswith('- ') for l in response.split('\\n'))",
    "from collections import Counter\ndef evaluate(text, least=2):\n"
    "    return max(Counter(text).values()) >= least",
    "LIMIT = 10\ndef count(t):\n    return len(t)\ndef evaluate(response):\n"
    "    return count(response) <= LIMIT",
    "import json\ndef evaluate(response):\n    try:\n        json.loads(response)\n        return True\n"
    "    except ValueError:\n        return False",
]


def check(source: str, texts: Sequence[str], call_s: float = 0.5) -> list[ConstraintVerdict]:
    """Return the verdict of the check function in `source` on each text, in a sandbox."""
    return check_texts(shared_sandbox(), source, texts, call_s=call_s)


@pytest.mark.each("source", CHECK_SOURCES)
def test_verdicts_equal_a_plain_interpreter(source: str) -> None:
    assert find_check_problem(source) == ""
    names: dict[str, object] = {}
    exec(source, names)
    expected = []
    for text in TEXTS:
        try:
            expected.append(names["evaluate"](text))  # type: ignore[operator]
        except ValueError:  # max() of an empty text
            expected.append(None)
    assert [verdict.accepts for verdict in check(source, TEXTS)] == expected


def test_function_state_does_not_survive_a_text() -> None:
    source = "seen = []\ndef evaluate(response):\n    seen.append(response)\n    return len(seen) == 1"
    assert [verdict.accepts for verdict in check(source, ["a", "b", "c"])] == [True] * 3


def test_ended_process_costs_a_single_text() -> None:
    source = "import os\ndef evaluate(response):\n    return True if response != 'b' else os._exit(0)"
    assert check(source, ["a", "b", "c"]) == [
        ConstraintVerdict(True), ConstraintVerdict(None, "ended its process"), ConstraintVerdict(True)]


def test_endless_call_is_the_last() -> None:
    source = "def evaluate(response):\n    while response == 'b': pass\n    return True"
    first, second, third = check(source, ["a", "b", "c"])
    assert first == ConstraintVerdict(True)
    assert (second.accepts, second.ended, second.reason) == (None, False, "did not end within 0.5 s")
    assert (third.accepts, third.ended) == (None, False)


@pytest.mark.each(("body", "reason"), [
    ("return 1", "gave a int, not True or False"),
    ("return None", "gave a NoneType"),
    ("return 'x' * 10**11 == ''", "MemoryError"),
    ("return open('/etc/shadow').read() == ''", "Error"),
    ("return __import__('socket').create_connection(('127.0.0.1', 9)) is None", "Error"),
    ("raise SystemExit(0)", "SystemExit"),
    ("return evaluate(response)", "RecursionError"),
    ("print('[0, true, \"\", true]')", "gave a NoneType"),
])
def test_missing_verdicts_have_a_reason(body: str, reason: str) -> None:
    verdict, = check(f"def evaluate(response):\n    {body}", ["x"])
    assert verdict.accepts is None
    assert reason in verdict.reason


PROBLEMS = {
    "def evaluate(r: return": "is no Python",
    "x = 1": "has no function evaluate",
    "def f():\n    def evaluate(r):\n        return True": "has no function evaluate",
    "def evaluate():\n    return True": "must take one argument",
    "def evaluate(a, b):\n    return True": "must take one argument",
    "def evaluate(a, *, b):\n    return True": "must take one argument",
    "import os\ndef evaluate(r):\n    return True": "imports os",
    "def evaluate(r):\n    import subprocess as re\n    return True": "imports subprocess",
    "from random import choice\ndef evaluate(r):\n    return choice([True, False])": "imports random",
    "from . import x\ndef evaluate(r):\n    return True": "imports .",
    "import time\ndef evaluate(r):\n    return True": "imports time",
    "def evaluate(r):\n    return open('/etc/passwd')": "names open",
    "def evaluate(r):\n    return ().__class__": "names .__class__",
    "def evaluate(r):\n    return __import__('os')": "names __import__",
    "import datetime\ndef evaluate(r):\n    return str(datetime.date.today()) in r": "names .today",
    "def evaluate(r):\n    return " + "(" * 500 + ")" * 500: "is no Python",
    "def evaluate(r):\n    return True\n" + "#" * 20_000: "at most 20,000",
    "def evaluate(r):\n    return '\0'": "is no Python",
}


@pytest.mark.each("source", PROBLEMS)
def test_invalid_sources_are_refused_before_running(source: str) -> None:
    assert PROBLEMS[source] in find_check_problem(source)


def test_setting_allows_a_library() -> None:
    source = "from pythainlp.tokenize import word_tokenize\ndef evaluate(r):\n    return True"
    assert "imports pythainlp" in find_check_problem(source)
    assert find_check_problem(source, ["pythainlp"]) == ""


@pytest.mark.each("line", ["5", "null", '[[], true, "", "ended"]', '[0, "yes", 5, "ended"]', "[" * 5000])
def test_forged_verdicts_are_ignored(line: str) -> None:
    source = f"""import collections
def evaluate(response):
    os = collections._sys.modules["os"]
    for fd in range(3, 10):
        try:
            os.write(fd, {line!r}.encode() + b"\\n")
        except OSError:
            pass
    return True"""
    assert find_check_problem(source) == ""
    assert [verdict.accepts for verdict in check(source, ["a"])] == [None]
