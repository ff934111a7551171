"""Code: a response's program against tests, in the sandbox."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, NotNegative, SettingsProblem, find_broken
from megatron_sov.chat.tool_calls import parse_turn
from megatron_sov.judge.rewards import solution_tests
from megatron_sov.judge.rewards.reward import OPERATION, Refused, Row, Score, short, text_of, told_short
from megatron_sov.judge.rewards.version import code_of
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, shared_sandbox

MAX_TESTS = 10_000
# possessive quantifiers: a response of many backticks must not take quadratic time
_FENCED = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\(\))?(?:\.[A-Za-z_]\w*(?:\(\))?)*", re.ASCII)


@dataclass(frozen=True)
class CodeReward:
    """1 for a program that passes all tests, else 0; or the share that it passes."""

    all_or_nothing: bool = True
    """Else the reward is the share of tests that are passed."""
    test_time_s: AboveZero = 10.0
    """Of processors, for one run of the program: for each test with an input, for all others together."""
    memory_bytes: AtLeastOne = 512 << 20
    """For the program."""
    enclosure: Literal["auto", "namespaces", "landlock"] = field(default="auto", metadata=OPERATION)
    """What encloses the program; auto: the best that this machine gives."""
    command: tuple[str, ...] = field(default=(), metadata=OPERATION)
    """A command that encloses it instead, as ["bwrap", ...]; `{folder}` stands for its folder."""
    patience: Annotated[NotNegative, Ge(1)] = field(default=3.0, metadata=OPERATION)
    """A program that sleeps or waits has so many times its time by the clock, in which the time that it waits
    for a processor does not count."""
    time_limit_s: AboveZero = field(default=300.0, metadata=OPERATION)
    """For a row; then its status is timeout."""

    def problems(self) -> list[SettingsProblem]:
        longest_s = self.patience * self.test_time_s
        return find_broken(self, "", (
            self.time_limit_s > longest_s, "time_limit_s",
            f"must be more than {self.patience:g} x test_time_s = {longest_s:g}: a program that waits is "
            "ended after so many seconds"))

    def inputs(self) -> dict[str, Any]:
        """Return what judges beside this process: the code of the sandbox's server, and its Python."""
        return {"server": code_of("megatron_sov.sandbox.server"),
                "python": list(sys.version_info[:2])}

    def prepare(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: this machine has none.
        """
        self._sandbox()

    def score(self, row: Row) -> Score:
        """Return whether the last program in the response passes the row's `tests`.

        Raises:
            Refused: the row has no tests, or such as cannot be read.
            RuntimeError: the sandbox failed, or the machine was too busy to say what the program is worth.
        """
        tests = _tests_of(row)
        passed, why, too_slow = self._judged(row, tests)
        share = sum(passed) / len(tests)
        reward = float(share == 1.0) if self.all_or_nothing else share
        return Score(reward, {"passed": sum(passed), "tests": len(tests), "why": short(why)},
                     timed_out=too_slow and share < 1)

    def passed(self, row: Row) -> list[bool]:
        """Return whether the program passes each of the row's `tests`; raises as `score` does.  Tests behind
        one that never ends are not reached, and count as not passed."""
        tests = _tests_of(row)
        passed, _, _ = self._judged(row, tests)
        # all tests by place: pass@k compares them one by one
        return passed + [False] * (len(tests) - len(passed))

    def _judged(self, row: Row, tests: list[Any]) -> tuple[list[bool], str, bool]:
        """Return which tests are passed, as far as they ran, why one is not, and whether time ran out."""
        # half of a surrogate pair cannot be sent to the sandbox
        source = program_in(text_of(row, "response")).encode(errors="replace").decode()
        if isinstance(tests[0], str):
            return self._tested(source, tests, row)
        return self._compared(source, tests)

    def _compared(self, source: str, tests: list[Any]) -> tuple[list[bool], str, bool]:
        """Run the program once per test and compare, out here, what it prints."""
        passed: list[bool] = []
        why, too_slow = "", False
        taken_s = 0.0
        for test in tests:
            # of one that is too slow no test is begun that the row's time may not be enough for
            if too_slow and self.time_limit_s - taken_s < self.patience * self.test_time_s:
                break
            expected = test["stdout"]
            outcome = self._run(Program(source, stdin=test["stdin"]), len(expected.encode(errors="replace")))
            # time that it waited for a processor is not the program's
            taken_s += outcome.wall_s - outcome.starved_s
            too_slow = too_slow or outcome.status == "timeout"
            right = outcome.status == "ok" and _lines(outcome.stdout) == _lines(expected)
            passed.append(right)
            if not right:
                why = why or outcome.reason or f"printed {told_short(outcome.stdout)}"
                # one failure decides: the other tests would only take time
                if self.all_or_nothing:
                    break
        return passed, why, too_slow

    def _tested(self, source: str, tests: list[Any], row: Row) -> tuple[list[bool], str, bool]:
        entry_point = row.get("entry_point", "")
        if not isinstance(entry_point, str):
            raise Refused(f"entry_point = {told_short(entry_point)} must be the name of a function")
        request = json.dumps({"tests": tests, "entry_point": entry_point})
        outcome = self._run(Program(_testing_program(), stdin=_framed(source) + _framed(request)))
        passed, why, done = [False] * len(tests), "", False
        # every line is of `solution_tests`: the solution's own output goes nowhere
        for line in filter(None, outcome.stdout.split("\n")):
            verdict = json.loads(line)
            done = done or "done" in verdict or "loaded" in verdict
            if "test" in verdict:
                passed[verdict["test"]] = verdict["passed"]
            why = why or verdict.get("reason", "")
        # without a last line the tests ended early, by a crash or a limit
        why = why if done else why or outcome.reason or "ended before its tests did"
        return passed, why, outcome.status == "timeout" or outcome.cpu_s >= self.test_time_s

    def _run(self, program: Program, expected_bytes: int = 0) -> Outcome:
        """Return what becomes of a program that has shown by itself what it is worth; it may write as much
        more than it should as any program may write."""
        limits = self._limits()
        # a right answer may be long: it is never cut by the limit of wrong ones
        limits = replace(limits, output_bytes=limits.output_bytes + expected_bytes)
        outcome = self._sandbox().run(program, limits)
        # the machine's fault leaves no reward; that of the program is worth 0
        if outcome.status == "infrastructure":
            raise RuntimeError(outcome.reason)
        if outcome.status == "refused":
            raise Refused(f"response and tests together: the program {outcome.reason}")
        return outcome

    def _limits(self) -> Limits:
        return Limits(wall_s=self.patience * self.test_time_s, cpu_s=self.test_time_s,
                      memory_bytes=self.memory_bytes)

    def _sandbox(self) -> Sandbox:
        return shared_sandbox(self.enclosure, self.command)


def program_in(response: str) -> str:
    """Return a response's program: its last fenced block of Python behind its thoughts, else all of it."""
    said = parse_turn(response).content
    blocks = [text for language, text in _FENCED.findall(said) if language.lower() in _PYTHON]
    # the last block: a response may show a draft before its final program
    return blocks[-1] if blocks else said.strip()


def _tests_of(row: Row) -> list[Any]:
    """Return tests as texts of Python, or as inputs with what has to be printed.

    Raises:
        Refused: there are none, they differ in kind, or one is something else.
    """
    tests = row.get("tests")
    if tests is None:
        raise Refused("has no 'tests'")
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not 0 < len(tests) <= MAX_TESTS:
        raise Refused(f"tests = {told_short(tests)} must be a list of 1 to {MAX_TESTS:,} tests")
    found = [_test(test) for test in tests]
    if len({type(test) for test in found}) > 1:
        raise Refused("tests has inputs to read beside calls or assertions: give them rows of their own")
    return found


def _test(test: Any) -> str | Mapping[str, str]:
    if isinstance(test, str):
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise Refused(f"test {told_short(test)} is no Python: {e}") from None
        return test
    if isinstance(test, dict) and {"stdin", "stdout"} <= set(test):
        if not (isinstance(test["stdin"], str) and isinstance(test["stdout"], str)):
            raise Refused(f"test {told_short(test)}: stdin and stdout must be texts")
        return {"stdin": test["stdin"], "stdout": test["stdout"]}
    if isinstance(test, dict) and {"function", "expected"} <= set(test):
        return _call(test)
    raise Refused(f"test {told_short(test)} must be a text of Python, or have stdin and stdout, or function, "
                  "arguments and expected")


def _call(test: Mapping[str, Any]) -> str:
    """Return the assertion of a call: what the function returns is compared as JSON has it."""
    function, arguments = test["function"], test.get("arguments", [])
    if not (isinstance(function, str) and _FUNCTION.fullmatch(function)):
        raise Refused(f"function = {told_short(function)} must be a name, such as add or Solution().add")
    if not isinstance(arguments, (list, dict)):
        raise Refused(f"arguments = {told_short(arguments)} must be a list, or an object by name")
    # arguments stand in the test as Python literals
    stars = "**" if isinstance(arguments, dict) else "*"
    return f"assert __plain__({function}({stars}{arguments!r})) == {test['expected']!r}"


def _lines(text: str) -> list[str]:
    """Return what counts of an output: its lines without blanks at their ends, and no empty ones last.

    Only "\\n" and "\\r\\n" end a line, and only blanks, tabs and "\\r" are blank: all else a program printed.
    """
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n")).rstrip("\n").split("\n")


def _framed(text: str) -> str:
    return f"{len(text.encode()):012d}{text}"


def _testing_program() -> str:
    try:
        return Path(solution_tests.__file__).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{solution_tests.__file__}: cannot be read ({e.strerror}); install the package with "
                        "its sources") from None
