"""Tests of rows of the reward `code`: public formats are run, and trivial or faulty tests refuse the row."""

from typing import Any

import pytest

from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.code_tests import is_same_output, read_tests
from megatron_sov.judge.rewards.reward import Refused, Result, run_reward
from megatron_sov.sandbox.program import Outcome, Program

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
SUBTRACT = "```python\ndef add(a, b):\n    return a - b\n```"
OTHER = "```python\ndef other(a, b):\n    return a * b\n```"
BROKEN = "```python\ndef add(a, b)\n    return a + b\n```"


def score(response: str, tests: Any, **fields: Any) -> Result:
    """Return the result of a row with these tests and fields: reward 1 if all tests pass, otherwise 0."""
    return run_reward(CodeReward(test_time_s=5), {"response": response, "tests": tests, **fields})


WITHOUT_ASSERTION = [
    "# add(1, 2) == 3", "print(add(1, 2))", "add(1, 2)", "import math", "pass", "'assert add(1, 2) == 3'",
    "def helper():\n    assert add(1, 2) == 3", "def test_add():\n    print(add(1, 2))",
    "class Sum:\n    def verify(self):\n        assert add(1, 2) == 3",
    "class TestAdd:\n    def run(self):\n        assert add(1, 2) == 3",
    "x = lambda: add(1, 2) == 3", "async def main():\n    assert add(1, 2) == 3"]

TRIVIAL = [
    "assert True", "assert 1 + 1 == 2", "assert add(1, 2) == add(1, 2)",
    "if False:\n    assert add(1, 2) == 3",
    "def test_a():\n    yield\n    assert add(1, 2) == 3",
    "def test_a():\n    return\n    assert add(1, 2) == 3",
    "for x in []:\n    assert add(x, x) == 0",
    "try:\n    assert add(1, 2) == 3\nexcept Exception:\n    pass",
    "assert add(1, 2) != 7", "add(1, 2)\nassert callable(add)"]


@pytest.mark.each("test", [*WITHOUT_ASSERTION, *TRIVIAL])
def test_a_row_that_every_program_would_pass_or_fail_is_refused(test: str) -> None:
    for response in (ADD, SUBTRACT):
        result = score(response, [test])
        assert (result.reward, result.status) == (None, "refused"), result
        assert "asserts nothing" in result.reason or test in TRIVIAL


@pytest.mark.parametrize("response, tests", [
    ("def find(x):\n    return None", ["assert find([]) is None"]),
    ("def find(x):\n    pass", [{"function": "find", "arguments": [3], "expected": None}]),
    ("def sort(x):\n    x.sort()", ["x = [2, 1]\nassert sort(x) is None\nassert x == [1, 2]"]),
    ("def flag():\n    return ''", ["assert not flag()"]), ("def one():\n    return 1", ["assert one()"]),
    ("def f(x):\n    raise ValueError", ["import pytest\nwith pytest.raises(ValueError):\n    f(1)"]),
    ("def f(x):\n    raise ValueError", ["try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"]),
    ("def f(x):\n    return 2", ["if f(1) != 2:\n    raise RuntimeError('wrong')"]),
    ("LIMIT = 3", ["assert LIMIT == 3"]), ("LIMIT = 3", ["x = LIMIT + 1\nassert x == 4"]),
    ("class Stack:\n    size = 0\n    def push(self, x):\n        self.size += 1", [
        "s = Stack()\ns.push(1)\nassert s.size == 1"]),
    ("from collections import Counter\ndef count(x):\n    return Counter(x)", [
        "assert count('aab') == Counter('aab')"])])
def test_rows_may_expect_none_errors_and_constants(response: str, tests: list[Any]) -> None:
    assert score(response, tests).reward == 1.0
    assert score("x = 1", tests).reward == 0.0


FAULTY_TESTS = [
    "import pandas\nassert add(1, 2) == 3", "from helpers import check_sum\nassert add(1, 2) == 3",
    "x = add(1, 2)\nimport pandas\nassert x == 3", "open('data.json').read()\nassert add(1, 2) == 3",
    "import pytest\n@pytest.mark.xfail\ndef test_a():\n    assert add(1, 2) == 3",
    "assert 1 == 2\nassert add(1, 2) == 3", "raise ValueError('no data')\nadd(1, 2)",
    "def check(candidate):\n    import pandas\n    assert candidate(1, 2) == 3"]


@pytest.mark.each("test", FAULTY_TESTS)
def test_tests_that_fail_by_themselves_are_refused(test: str) -> None:
    for response in (ADD, SUBTRACT, BROKEN, OTHER, "no program"):
        result = score(response, ["assert add(1, 2) == 3", test])
        assert (result.reward, result.status) == (None, "refused"), result
        assert "test 2 of 2 fails before it uses the program" in result.reason


FORMATS: dict[str, Any] = {
    "MBPP": ["assert add(1, 2) == 3", "assert add(0, 2) == 2"],
    "HumanEval": "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
    "HumanEval that calls": "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)\n",
    "KodCode": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n",
    "a module": "import solution\ndef test_add():\n    assert solution.add(1, 2) == 3",
    "a module by another name": "import solution as s\nassert s.add(1, 2) == 3",
    "all names": "from solution import *\nassert add(1, 2) == 3",
    "approx": "import pytest\ndef test_a():\n    assert add(0.1, 0.2) == pytest.approx(0.3)",
    "approx of lists": "from pytest import approx\ndef test_a():\n"
                       "    assert [add(0.1, 0.2), 1] == approx([0.3, 1])",
    "raises": "import pytest\ndef test_a():\n    with pytest.raises(TypeError, match='unsupp') as e:\n"
              "        add(1, None)\n    assert 'operand' in str(e.value)\n    assert add(1, 2) == 3",
    "pytest.main": "import pytest, sys\ndef test_a():\n    assert add(1, 2) == 3\n"
                   "if __name__ == '__main__':\n    sys.exit(pytest.main([__file__]))",
    "async": "import asyncio\nasync def test_a():\n    await asyncio.sleep(0)\n    assert add(1, 2) == 3",
    "helpers": "def verify(*given):\n    assert add(*given) == sum(given)\nverify(1, 2)",
    "numpy": "import numpy as np\nassert (add(np.array([1, 2]), 1) == np.array([2, 3])).all()",
    "numpy's assertions": "import numpy as np\nassert add(np.ones((2, 0, 3)), 1).shape == (2, 0, 3)\n"
                          "np.testing.assert_allclose(add(np.float64(1), 2), 3)",
    "a call": [{"function": "add", "arguments": {"a": 1, "b": 2}, "expected": 3}]}


@pytest.mark.tier1_cases(6)
@pytest.mark.parametrize("form", FORMATS)
def test_public_test_formats(form: str) -> None:
    assert score(ADD, FORMATS[form]).reward == 1.0, score(ADD, FORMATS[form])
    for wrong in (SUBTRACT, BROKEN, OTHER, "I cannot."):
        result = score(wrong, FORMATS[form])
        assert (result.reward, result.status) == (0.0, "scored") and result.components["why"], result


def test_an_async_solution_is_awaited() -> None:
    response = "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0)\n    return a + b"
    tests = ["import asyncio\nassert asyncio.run(add(1, 2)) == 3",
             "async def test_a():\n    assert await add(1, 2) == 3"]
    assert score(response, tests).reward == 1.0
    assert score(response.replace("+", "-"), tests).reward == 0.0


def test_check_gets_the_one_function_of_the_program() -> None:
    check = "def check(candidate):\n    assert candidate(1, 2) == 3"
    helped = "def plus(a, b):\n    return a + b\ndef total(a, b):\n    return plus(a, b)"
    assert score(helped, check).reward == 1.0
    assert score(helped.replace("a + b", "a - b"), check).reward == 0.0
    assert score("x = 1", check).components["why"] == "defines no function"
    two_functions = "def add(a, b):\n    return a + b\ndef sub(a, b):\n    return a - b"
    assert "entry_point is missing, and the program has add, sub:" in score(two_functions, check).reason
    assert score(two_functions, check, entry_point="add").reward == 1.0
    assert score(two_functions, check, entry_point="sub").reward == 0.0
    missing = score(two_functions, check, entry_point="mul")
    assert missing.components["why"] == "NameError: name 'mul' is not defined"
    method = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert score(method, check, entry_point="Solution().add").reward == 1.0
    assert score(method, check, entry_point="add; import os").status == "refused"


@pytest.mark.each("tests", [
    {"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]}, '{"inputs": ["1 2"], "outputs": ["3"]}',
    '[{"input": "1 2", "output": "3", "testtype": "stdin"}]', [{"input": "1 2", "output": "3"}],
    {"inputs": [["1 2"]], "outputs": [["3"]]}, [{"stdin": "1 2", "stdout": ["3", ""]}]])
def test_inputs_of_taco_and_livecodebench_are_read(tests: Any) -> None:
    response = "```python\nprint(sum(map(int, input().split())))\n```\nIt prints\n```\n3\n```"
    assert score(response, tests).reward == 1.0
    assert score(response.replace("sum", "max"), tests).reward == 0.0


@pytest.mark.each("tests, reason", [
    ({"inputs": ["1"], "outputs": []}, "lists of one length"),
    ({"inputs": [[1]], "outputs": [1], "fn_name": "f"}, "write each as function"),
    ([{"input": "[1]", "output": "1", "testtype": "functional"}], "must be a text of Python"),
    ([{"stdin": "1", "stdout": " \n"}, {"stdin": "2", "stdout": ""}], "expect no output"),
    ({"inputs": [[1]], "outputs": ["1"]}, "must be texts"),
    (None, "has no 'tests'"), ([], "must be a list"), ([3], "must be a text of Python"),
    (["assert ("], "is no Python"),
    (["assert 1", {"stdin": "", "stdout": ""}], "inputs to read beside calls"),
    ([{"stdin": 1, "stdout": ""}], "must be texts"),
    ([{"function": "f(); import os", "expected": 1}], "must be a name"),
    ([{"function": "f", "arguments": 3, "expected": 1}], "must be a list, or an object"),
    # forms that are not supported
    (["import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertTrue(add)"],
     "class T holds tests"),
    (["class TestAdd:\n    def test_a(self):\n        assert add(1, 2) == 3"], "class TestAdd holds tests"),
    (["import pytest\n@pytest.mark.parametrize('a', [1, 2])\ndef test_a(a):\n    assert add(a, 0) == a"],
     "test_a takes arguments"),
    (["def test_a(*, capsys):\n    add(1, 2)\n    assert capsys.readouterr()"], "test_a takes arguments")])
def test_malformed_tests_are_refused(tests: Any, reason: str) -> None:
    result = score(ADD, tests)
    assert (result.reward, result.status) == (None, "refused") and reason in result.reason, result


def test_names_that_tests_take_from_the_program() -> None:
    def find_names(*texts: str) -> set[str]:
        return set(read_tests({"tests": list(texts)}, 0.0, "lines").names)

    assert find_names("assert f(1) == g.x + abs(2)") == {"f", "g"}
    assert find_names(
        "import math\nfrom os import path\nassert f(math.pi, path) == [x for x in y]") == {"f", "y"}
    assert find_names("def test_a(f=1):\n    x = h()\n    assert f(x)") == {"h"}
    assert find_names("from solution import a as b, c\nassert b(c)") == {"a", "c"}
    assert find_names("import solution as s\nassert s.a(s.b)") == {"a", "b"}
    assert find_names("def test_a():\n    class T:\n        assert f(lambda z: z + k)") == {"f", "k"}
    assert find_names("x = 1\nassert f(x)", "assert g(x)") == {"f", "g"}
    with pytest.raises(Refused):
        find_names("x = 1")


@pytest.mark.each("printed, expected, equal", [
    ("8\r\n\n9 \t\n\n", "8\n\n9", True), ("8", "8\n", True), ("", "\n\n", True), ("8\n9", "8 9", False),
    *((f"8{mark}9", "8\n9", False) for mark in "\x1c\x1d\x1e\x0b\x0c\r\x85\u2028\u2029"),
    *((f"8{mark}", "8", False) for mark in "\x1c\x85\u2028\xa0"), ("8\x1c9", "8\x1c9", True)])
def test_only_newlines_end_a_line(printed: str, expected: str, equal: bool) -> None:
    assert is_same_output(printed, expected, "lines", 0.0) is equal


@pytest.mark.each("printed, expected, lines, tokens, close", [
    # equal by lines; by tokens; by lines with a tolerance of 1e-6
    ("1 2", "1 2", True, True, True), ("1  2", "1 2", False, True, True), ("1\n2", "1 2", False, True, False),
    (str(1 / 3), "0.333333333333", False, False, True), ("0.33334", "0.333333", False, False, False),
    ("1000000.5", "1000000.1", False, False, True), ("1000002.5", "1000000.1", False, False, False),
    ("2.0000000", "2", False, False, True), ("2", "2.0", False, False, True), ("3", "2", False, False, False),
    ("1000000008", "1000000007", False, False, False), ("1000000008.0", "1000000007", False, False, False),
    ("9007199254740993.0", "9007199254740992", False, False, False), ("1e-7", "0.0", False, False, True),
    ("1e9", "1000000000.0", False, False, True), ("inf", "inf", True, True, True),
    ("-0.0000001", "0.0", False, False, True), *((*pair, False, False, False) for pair in (
        ("nan", "0.5"), ("1e400", "1e401"), ("a 0.1", "b 0.1"), ("0.5 0.5", "0.5"), ("", "0.0"),
        ("0.5,", "0.5"), ("1_0.0", "10.0"), ("٣.0", "3.0"), ("9" * 300_000 + "x", "0.5"),
        ("1e999999", "0.5")))])
def test_outputs_by_lines_tokens_and_within_a_tolerance(printed: str, expected: str, lines: bool,
                                                        tokens: bool, close: bool) -> None:
    assert is_same_output(printed, expected, "lines", 0.0) is lines
    assert is_same_output(printed, expected, "tokens", 0.0) is tokens
    assert is_same_output(printed, expected, "lines", 1e-6) is close


def test_a_row_or_a_setting_gives_the_tolerance() -> None:
    outputs = [{"stdin": "", "stdout": "0.333333333333"}]
    calls = [{"function": "f", "arguments": [[0.1, 0.2]], "expected": [0.3, {"n": 3}]}]
    printing, adding = "print(1/3)", "def f(a):\n    return (sum(a), {'n': 3})"
    assert score(printing, outputs).reward == 0.0 and score(adding, calls).reward == 0.0
    assert score(printing, outputs, number_tolerance=1e-6).reward == 1.0
    assert score(adding, calls, number_tolerance=1e-6).reward == 1.0
    lenient = CodeReward(number_tolerance=1e-6, compare_by="tokens")
    for response, tests, reward in ((printing, outputs, 1.0), (adding, calls, 1.0),
                                    (adding.replace("3", "4"), calls, 0.0),
                                    ("print(0.3, 1)", [{"stdin": "", "stdout": "0.3\n1"}], 1.0)):
        assert run_reward(lenient, {"response": response, "tests": tests}).reward == reward
    strict_row = {"response": printing, "tests": outputs, "number_tolerance": 0, "compare_by": "lines"}
    assert run_reward(lenient, strict_row).reward == 0.0
    for field, value in (("number_tolerance", -1), ("number_tolerance", "x"), ("number_tolerance", True),
                         ("compare_by", "words")):
        assert field in score(printing, outputs, **{field: value}).reason


def test_tests_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = CodeReward._run_program

    def note_run(self: CodeReward, program: Program, *more: Any) -> Outcome:
        runs.append(program.stdin)
        return run(self, program, *more)

    monkeypatch.setattr(CodeReward, "_run_program", note_run)
    row = {"response": ADD, "tests": ["assert add(1, 2) == 3 # proved once"]}
    assert [run_reward(CodeReward(), row).reward for _ in range(3)] == [1.0] * 3
    assert len(runs) == 3 + 1 and sum("_Stub" in stdin for stdin in runs) == 1, "three responses, one check"


NUMPY_TESTS = ["assert np.allclose(f(1), {})", "assert np.allclose({}, f(1))",
               "assert np.isclose(f(1), {}).all()", "np.testing.assert_allclose(f(1), {})",
               "np.testing.assert_array_equal(f(1), {})",
               "np.testing.assert_almost_equal(f(1), {})"]


@pytest.mark.tier1_cases(8)
@pytest.mark.parametrize("test", NUMPY_TESTS)
@pytest.mark.parametrize(("result", "expected", "reward"), [
    ("[]", "3.0", 0.0), ("np.zeros((0, 1))", "[3.0, 4.0]", 0.0), ("np.zeros(0)", "[3.0]", 0.0),
    ("[[]]", "[[3.0]]", 0.0), ("np.zeros(0)", "[]", 1.0), ("np.zeros((0, 2))", "np.zeros((0, 2))", 1.0),
    ("[3.0, 4.0]", "[3.0, 4.0]", 1.0), ("3", "3.0", 1.0)])
def test_empty_array_equals_only_empty_arrays(test: str, result: str, expected: str, reward: float) -> None:
    """An empty array must not pass: numpy broadcasts it, and `all` of no elements is true."""
    text = "import numpy as np\n" + test.format(expected)
    program = f"```python\nimport numpy as np\ndef f(x):\n    return {result}\n```"
    assert score(program, [text]).reward == reward
