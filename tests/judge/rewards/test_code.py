"""Reward `code`: verdicts equal those of `exec` in a plain interpreter, and solutions cannot forge them."""

from typing import Any

import pytest

from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.reward import Result, run_reward
from megatron_sov.judge.rewards.version import hash_code
from megatron_sov.sandbox.program import Outcome, Program
from megatron_sov.sandbox.sandbox import SANDBOXES
from tests.typed_words import keys_of


def score(enclosure: str, response: str, tests: Any, **fields: Any) -> Result:
    """Return the result of a row with these tests and fields; its reward is the share of passed tests."""
    return run_reward(CodeReward(all_or_nothing=False, enclosure=enclosure, test_time_s=2),
                      {"response": response, "tests": tests, **fields})


SOLUTIONS = {
    "numbers": ("def add(a, b):\n    return a + b", [
        "assert add(1, 2) == 3", "assert add(0.1, 0.2) != 0.3", "assert abs(add(0.1, 0.2) - 0.3) < 1e-9",
        "assert add(2 ** 70, 1) == 2 ** 70 + 1", "assert add(1, 2) == 4", "assert isinstance(add(1, 2), int)",
        "assert add(1j, 1) == 1 + 1j", "assert add('a', 'b') == 'ab'"]),
    "containers": ("def turn(x):\n    return x[::-1]\ndef pairs(x):\n    return list(enumerate(x))\n"
                   "def table(x):\n    return {k: {v} for k, v in x}", [
        "assert turn([1, (2, 3)]) == [(2, 3), 1]", "assert turn((1, 2)) == [2, 1]",
        "assert turn(b'ab') == b'ba'",
        "assert pairs('ab') == [(0, 'a'), (1, 'b')]", "assert table([(1, 2)]) == {1: {2}}",
        "assert set(turn([1, 2])) == {1, 2}", "assert turn(range(3)) == range(2, -1, -1)",
        "assert len(turn([1, 2, 3])) == 3 and 2 in turn([1, 2, 3])", "from collections import deque\n"
        "assert table([(1, 2)]).get(3) is None and deque(turn([1])) == deque([1])"]),
    "changed in place": ("def sort(x):\n    x.sort()\ndef drop(d):\n    d.clear()\n"
                         "def grow(s):\n    s.add(9)", [
        "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]", "d = {1: 2}\ndrop(d)\nassert not d",
        "s = {1}\ngrow(s)\nassert s == {1, 9}", "x = [2, 1]\nassert sort(x) is None and x == [2, 1]"]),
    "errors": ("class Empty(Exception):\n    pass\ndef pop(x):\n    if not x:\n"
               "        raise Empty('no more')\n    return x.pop()\ndef leave():\n    raise SystemExit(0)", [
        "try:\n    pop([])\n    assert False\nexcept Empty as e:\n    assert str(e) == 'no more'",
        "try:\n    pop(3)\n    assert False\nexcept AttributeError:\n    pass", "assert pop([]) == 1",
        "assert pop([1]) == 1",
        "leave()\nassert 1 == 2"]),
    "objects": ("class Stack:\n    kind = 'stack'\n"
                "    def __init__(self, *items):\n        self.items = list(items)\n"
                "    def push(self, x):\n        self.items.append(x)\n        return self\n"
                "    def __len__(self):\n        return len(self.items)\n    def __eq__(self, other):\n"
                "        return self.items == other.items\n"
                "    def __getitem__(self, i):\n"
                "        return self.items[i]\n    def __str__(self):\n"
                "        return 'Stack' + str(self.items)\ndef top(s):\n    return s.items[-1]", [
        "s = Stack(1)\ns.push(2).push(3)\nassert len(s) == 3 and s.items == [1, 2, 3] and s[1] == 2",
        "assert Stack(1) == Stack(1) and Stack(1) != Stack(2)", "assert isinstance(Stack(), Stack)",
        "assert str(Stack(1)) == 'Stack[1]' and Stack.kind == 'stack'", "assert top(Stack(1, 5)) == 5",
        "s = Stack()\ns.items = [7]\nassert s[0] == 7", "assert Stack()", "assert Stack(1) == Stack(2)"]),
    "functions as arguments": ("def apply(f, x):\n    return [f(i) for i in x]\n"
                               "def count(n):\n    yield from range(n)\n"
                               "def value(node):\n    return node.value + node.rest()", [
        "assert apply(lambda v: v * 2, [1, 2]) == [2, 4]", "assert list(count(3)) == [0, 1, 2]",
        "assert sum(apply(abs, [-1, 1])) == 2", "assert next(iter(count(2))) == 0",
        "class Node:\n    value = 3\n    def rest(self):\n        return 4\nassert value(Node()) == 7",
        "def test_it():\n    assert apply(str, [1]) == ['1']",
        "def test_wrong():\n    assert apply(str, [1]) == [1]"]),
}


@pytest.mark.tier1_cases(4)
@pytest.mark.parametrize("name", SOLUTIONS)
def test_verdicts_equal_a_plain_interpreter(enclosure: str, name: str) -> None:
    solution, tests = SOLUTIONS[name]
    num_passed = 0
    for test in tests:
        names: dict[str, Any] = {"__name__": "__main__"}
        try:
            exec(solution + "\n" + test, names)
            for key in [key for key in names if key.startswith("test_")]:
                names[key]()
            num_passed += 1
        except (Exception, SystemExit):
            pass
    result = score(enclosure, f"So:\n```python\n{solution}\n```\n", tests)
    assert result.components["passed"] == num_passed, result
    some_fail = num_passed < len(tests) or name == "containers"
    assert num_passed and some_fail


CHEATS = {  # test_attackers.py has forged messages and exits
    "what equals everything": """
class All:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return self
    __rsub__ = __abs__ = __sub__
    def __iter__(self): return iter([self])
    def __hash__(self): return 1
def f(x): return All()""",
    "its own abs, set and math": """
class math:
    isclose = staticmethod(lambda *a: True)
def abs(x): return 0
def set(x): return 7
def sorted(x): return 7
def f(x): return 'no'""",
    "an end of the loop": "def f(x):\n    raise StopIteration",
    "files of the process that tests": """
import os
for pid in (os.getppid(), 1):
    for fd in range(16):
        for mode in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
            try:
                opened = os.open("/proc/%d/fd/%d" % (pid, fd), mode)
                for i in range(9):
                    os.write(opened, b'{"test": %d, "passed": true}' % i + bytes([10]))
            except OSError:
                pass
def f(x): return None""",
    "tests in its memory": """
import gc, sys, os
def f(x):
    seen = [o for o in gc.get_objects() if isinstance(o, str) and '1234' in o]
    frame = sys._getframe()
    while frame:
        seen += [v for v in frame.f_globals.values() if isinstance(v, str) and '1234' in v]
        frame = frame.f_back
    assert not seen
    return 1234 if seen else 0""",
    "built-in functions for the tests": """
import sys
frame = sys._getframe()
while "peer" not in frame.f_locals:
    frame = frame.f_back
peer = frame.f_locals["peer"]
def f(x): return 0
built_in = {"abs": lambda x: 0, "sorted": lambda x: [1234], "all": lambda x: True, "map": map, "set": set}
peer.send({"f": ["value", peer.encoded(f)], "__builtins__": ["value", peer.encoded(built_in)]})
peer.serve()""",
    "a module that tests import": """
with open("colorsys.py", "w") as written:
    written.write("import builtins\\nbuiltins.abs = lambda x: 0")
def f(x): return 0""",
}
CHEAT_TESTS = ["assert f(1) == 1234", "assert abs(f(1) - 1234) < 1e-6", "assert set([f(1)]) == {1234}",
            "assert sorted([f(1)]) == [1234]", "import math\nassert math.isclose(f(1), 1234)",
            "assert f(1) in (1234,)", "import colorsys\nassert abs(f(1) - 1234) < 1e-6",
            "assert 1234 in [f(1)]", "assert all(map(lambda x: f(x) == 1234, range(9)))"]


@pytest.mark.each("name", CHEATS)
def test_solutions_cannot_forge_verdicts(enclosure: str, name: str) -> None:
    result = score(enclosure, CHEATS[name], CHEAT_TESTS)
    assert (result.status, result.reward) == ("scored", 0.0), result
    assert result.components["why"]


def test_thousands_of_failures_are_a_verdict(enclosure: str) -> None:
    raising = "def f(x):\n    raise ValueError(chr(0x1F600) * 300)"
    result = score(enclosure, raising, ["assert f(1)"] * 400)
    assert (result.status, result.reward) == ("scored", 0.0), result
    assert "ValueError" in result.components["why"]


def test_an_output_may_be_as_long_as_the_expected_one(enclosure: str) -> None:
    test = {"stdin": "", "stdout": "1234567\n" * 200_000}
    result = score(enclosure, "print('1234567\\n' * 200_000)", [test])
    assert (result.status, result.reward) == ("scored", 1.0), result


def test_outputs_and_calls_are_compared(enclosure: str) -> None:
    reads = "n = int(input())\nprint(n * 2, ' ')\nprint()"
    assert score(enclosure, reads, [{"stdin": "4\n", "stdout": "8\n"}, {"stdin": "5", "stdout": "11"},
                                    {"stdin": "x", "stdout": ""}]).reward == pytest.approx(1 / 3)
    adds = "class Solution:\n    def add(self, a, b=0):\n        return (a + b, [a])"
    calls = [{"function": "Solution().add", "arguments": [1, 2], "expected": [3, [1]]},
             {"function": "Solution().add", "arguments": {"a": 1, "b": 1}, "expected": [2, [1]]},
             {"function": "Solution().add", "expected": None}]
    assert score(enclosure, adds, calls).reward == pytest.approx(2 / 3)
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    assert score(enclosure, "def twice(x):\n    return 2 * x", check, entry_point="twice").reward == 1


def test_all_or_nothing_is_the_default_and_explains_failures(enclosure: str) -> None:
    row = {"response": "def f(x): return x", "tests": ["assert f(1) == 1", "assert f(1) == 2, 'wrong'"]}
    result = run_reward(CodeReward(enclosure=enclosure), row)
    assert (result.reward, result.components) == (
        0.0, {"passed": 1, "tests": 2, "why": "AssertionError: wrong"})
    broken = run_reward(CodeReward(enclosure=enclosure), {**row, "response": "```python\ndef f(x)\n```"})
    assert broken.reward == 0 and "SyntaxError" in broken.components["why"]
    endless = run_reward(CodeReward(enclosure=enclosure, test_time_s=0.3, patience=100),
                         {**row, "response": "def f(x):\n    while 1: pass"})
    assert (endless.status, endless.reward) == ("timeout", 0.0) and "processors" in endless.components["why"]


@pytest.mark.each("outcome, status, reward", [
    (Outcome("infrastructure", None, "", "", "the server failed", 0, 0), "failed", None),
    (Outcome("infrastructure", None, "", "", "the machine is too busy", 630, 4.0, 600.0), "failed", None),
    (Outcome("timeout", None, "", "", "took longer than 30 s", 55, 0.1, 25.0), "timeout", 0.0),  # it waited
    (Outcome("timeout", None, "", "", "took more than 10 s of processors", 2, 10.0, 0.5), "timeout", 0.0),
    (Outcome("refused", None, "", "", "has 17 MiB", 0, 0), "refused", None),
    (Outcome("memory", None, "", "", "took more", 1, 1), "scored", 0.0)])
def test_machine_failures_have_no_reward(outcome: Outcome, status: str, reward: float | None,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    class FixedSandbox:
        def run(self, program: Program, limits: object) -> Outcome:
            return outcome

    monkeypatch.setitem(SANDBOXES, ("auto", (), 1), FixedSandbox())
    result = run_reward(CodeReward(), {"response": "x", "tests": ["assert x"]})
    assert (result.status, result.reward) == (status, reward)


@pytest.mark.parametrize("waits", ["time.sleep(60)", "os.read(os.pipe()[0], 1)"])
def test_waiting_program_times_out(enclosure: str, waits: str) -> None:
    source = f"import os, time\nwhile time.process_time() < 0.06:\n    pass\n{waits}"
    result = run_reward(CodeReward(enclosure=enclosure, test_time_s=0.3),
                        {"response": source, "tests": [{"stdin": "", "stdout": "1"}]})
    assert (result.status, result.reward) == ("timeout", 0.0), result


def test_slow_program_stays_within_the_row_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Outcome("timeout", None, "", "", "took more than 10 s of processors", 10, 10.0)
    runs: list[None] = []
    monkeypatch.setattr(CodeReward, "_run_program", lambda *_: (runs.append(None), slow)[1])
    row = {"response": "while 1: pass", "tests": [{"stdin": "", "stdout": "1"}] * 100}
    result = run_reward(CodeReward(all_or_nothing=False), row)
    assert (result.status, result.reward) == ("timeout", 0.0)
    assert 20 < len(runs) < 30, "programs of 10 s each until the row's time is spent, not all 100"
    assert keys_of(CodeReward(test_time_s=100)) == ["time_limit_s"]
    assert keys_of(CodeReward(test_time_s=99)) == []


def test_version_covers_the_sandbox_and_its_server() -> None:
    code_hash = hash_code(CodeReward.__module__)
    assert {f"megatron_sov.{name}" for name in ("sandbox.sandbox", "sandbox.supervision",
                                                "work.processes.process_tree")} <= set(code_hash)
    server_hash = CodeReward().inputs()["server"]
    assert {f"megatron_sov.sandbox.{name}"
            for name in ("server", "restrictions", "enclosures")} <= set(server_hash)
