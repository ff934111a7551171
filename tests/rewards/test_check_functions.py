"""Check functions: verdicts are those of a plain interpreter, and no function gets around its limits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_sov.rewards.constraint import Verdict, problem_of, verdicts
from megatron_sov.work.sandbox import shared_sandbox

TEXTS = ["One line.", "a, b and c", "", "  ", "서울은 한국의 수도입니다.", "ภาษาไทย", "- x\n- y\n- z",
         '"in quotes"', "5 and 7", "a" * 10_000, "\U0001f600", "null\0byte"]
HONEST = [
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


def asked(source: str, texts: Sequence[str], call_s: float = 0.5) -> list[Verdict]:
    return verdicts(shared_sandbox(), source, texts, call_s=call_s)


@pytest.mark.parametrize("source", HONEST)
def test_verdicts_are_those_of_a_plain_interpreter(source: str) -> None:
    assert problem_of(source) == ""
    names: dict[str, object] = {}
    exec(source, names)
    expected = []
    for text in TEXTS:
        try:
            expected.append(names["evaluate"](text))  # type: ignore[operator]
        except ValueError:  # max() of nothing
            expected.append(None)
    assert [one.accepts for one in asked(source, TEXTS)] == expected


def test_what_a_function_keeps_is_gone_at_the_next_text() -> None:
    source = "seen = []\ndef evaluate(response):\n    seen.append(response)\n    return len(seen) == 1"
    assert [one.accepts for one in asked(source, ["a", "b", "c"])] == [True] * 3


def test_a_process_that_ends_takes_no_other_text_with_it() -> None:
    source = "import os\ndef evaluate(response):\n    return True if response != 'b' else os._exit(0)"
    assert asked(source, ["a", "b", "c"]) == [
        Verdict(True), Verdict(None, "ended its process"), Verdict(True)]


def test_a_call_that_does_not_end_is_the_last() -> None:
    source = "def evaluate(response):\n    while response == 'b': pass\n    return True"
    first, second, third = asked(source, ["a", "b", "c"])
    assert first == Verdict(True)
    assert (second.accepts, second.ended, second.reason) == (None, False, "did not end within 0.5 s")
    assert (third.accepts, third.ended) == (None, False)


@pytest.mark.parametrize(("body", "reason"), [
    ("return 1", "gave a int, not True or False"),
    ("return None", "gave a NoneType"),
    ("return 'x' * 10**11 == ''", "MemoryError"),
    ("return open('/etc/shadow').read() == ''", "Error"),
    ("return __import__('socket').create_connection(('127.0.0.1', 9)) is None", "Error"),
    ("raise SystemExit(0)", "SystemExit"),
    ("return evaluate(response)", "RecursionError"),
    ("print('[0, true, \"\", true]')", "gave a NoneType"),
])
def test_what_gives_no_verdict_is_told(body: str, reason: str) -> None:
    told, = asked(f"def evaluate(response):\n    {body}", ["x"])
    assert told.accepts is None
    assert reason in told.reason


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


@pytest.mark.parametrize("source", PROBLEMS, ids=range(len(PROBLEMS)))
def test_a_source_that_is_no_check_is_refused_before_it_runs(source: str) -> None:
    assert PROBLEMS[source] in problem_of(source)


def test_a_setting_lets_a_library_in() -> None:
    source = "from pythainlp.tokenize import word_tokenize\ndef evaluate(r):\n    return True"
    assert "imports pythainlp" in problem_of(source)
    assert problem_of(source, ["pythainlp"]) == ""


@pytest.mark.parametrize("line", ["5", "null", '[[], true, "", "ended"]', '[0, "yes", 5, "ended"]',
                                  "[" * 5000], ids=["number", "null", "place", "kinds", "deep"])
def test_a_function_that_writes_verdicts_of_its_own_gives_none(line: str) -> None:
    source = f"""import collections
def evaluate(response):
    os = collections._sys.modules["os"]
    for fd in range(3, 10):
        try:
            os.write(fd, {line!r}.encode() + b"\\n")
        except OSError:
            pass
    return True"""
    assert problem_of(source) == ""
    assert [one.accepts for one in asked(source, ["a"])] == [None]
