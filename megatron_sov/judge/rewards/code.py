"""Reward `code`: run a response's program against tests in the sandbox."""

import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge

from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, NotNegative, SettingsProblem, Share, find_broken_rules)
from megatron_sov.judge.rewards import solution_frameworks, solution_peer, solution_tests
from megatron_sov.judge.rewards.code_tests import CANDIDATE, CompareBy, RowTests, is_same_output, read_tests
from megatron_sov.judge.rewards.program_text import extract_program, find_entry_points
from megatron_sov.judge.rewards.reward import (
    OPERATION, Refused, Row, Score, format_short, get_text, shorten_reason)
from megatron_sov.judge.rewards.version import get_installed_version, hash_code, read_source
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, shared_sandbox

MAX_CACHED_FAULTS = 10_000
"""Most entries in `_CACHED_FAULTS`."""
_CACHED_FAULTS: dict[tuple[Any, ...], str] = {}
"""(settings, hash of a row's tests) -> fault; "" for valid tests."""


@dataclass(frozen=True)
class CodeReward:
    """Reward `code`: 1 for a program that passes all tests, else 0; or the passed share."""

    all_or_nothing: bool = True
    """1 or 0; otherwise the passed share."""
    number_tolerance: Share = 0.0
    """Absolute or relative tolerance for decimals in outputs and `expected` results; integers must be equal.
    A row's `number_tolerance` takes precedence."""
    compare_by: CompareBy = "lines"
    """Compare outputs by lines or by whitespace-separated tokens. A row's `compare_by` takes precedence."""
    test_time_s: AboveZero = 10.0
    """Processor time per run: per test with an input, or for all function tests together."""
    memory_bytes: AtLeastOne = 512 << 20
    """Memory for the program."""
    enclosure: Literal["auto", "namespaces", "landlock"] = field(default="auto", metadata=OPERATION)
    """Sandbox type; auto: the strongest on this machine."""
    command: tuple[str, ...] = field(default=(), metadata=OPERATION)
    """Enclosing command instead, e.g. ["bwrap", ...]; `{folder}` is replaced by the program's folder."""
    patience: Annotated[NotNegative, Ge(1)] = field(default=3.0, metadata=OPERATION)
    """Clock time per processor time, for programs that sleep; waiting for a processor does not count."""
    time_limit_s: AboveZero = field(default=300.0, metadata=OPERATION)
    """Time per row; afterwards the status is `timeout`."""

    def problems(self) -> list[SettingsProblem]:
        longest_s = self.patience * self.test_time_s
        return find_broken_rules(self, "", (
            self.time_limit_s > longest_s, "time_limit_s",
            f"must be more than {self.patience:g} x test_time_s = {longest_s:g}: a program that waits is "
            "ended after so many seconds"))

    def inputs(self) -> dict[str, Any]:
        """Return version inputs beyond this process: sandbox server code, Python and `numpy` versions."""
        return {"server": hash_code("megatron_sov.sandbox.server"),
                "python": list(sys.version_info[:2]), "numpy": get_installed_version("numpy")}

    def prepare(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: the machine cannot sandbox programs.
        """
        self._get_sandbox()

    def score(self, row: Row) -> Score:
        """Run the response's program against the row's `tests`.

        Raises:
            Refused: the tests are missing, malformed, trivial, or fail by themselves.
            RuntimeError: the sandbox failed, or the machine was too busy.
        """
        tests = self._read_tests(row)
        if fault := self._find_cached_fault(tests):
            raise Refused(fault)
        return self._score_tests(row, tests)

    def _score_tests(self, row: Row, tests: RowTests) -> Score:
        passed, why, too_slow = self._run_response(row, tests)
        share = sum(passed) / len(tests)
        reward = float(share == 1.0) if self.all_or_nothing else share
        return Score(reward, {"passed": sum(passed), "tests": len(tests), "why": shorten_reason(why)},
                     timed_out=too_slow and share < 1)

    def _read_tests(self, row: Row) -> RowTests:
        return read_tests(row, self.number_tolerance, self.compare_by)

    def _find_cached_fault(self, tests: RowTests) -> str:
        """Return the reason why the tests cannot judge programs; "" for valid tests.

        Two stub programs run through the tests. A test that fails before its first call fails for every
        program, and tests that both stubs pass are trivial. A single stub would not suffice: `None` may be
        the right result.
        """
        if not tests.texts:
            return ""
        read = json.dumps([tests.texts, tests.entry_point, tests.number_tolerance])
        digest = hashlib.sha256(read.encode()).digest()
        key = (self.test_time_s, self.memory_bytes, self.enclosure, self.command, digest)
        if key not in _CACHED_FAULTS:
            if len(_CACHED_FAULTS) >= MAX_CACHED_FAULTS:
                _CACHED_FAULTS.clear()
            _CACHED_FAULTS[key] = self._find_fault(tests)
        return _CACHED_FAULTS[key]

    def _find_fault(self, tests: RowTests) -> str:
        # Time left in the row's limit, for two programs.
        time_s = min(self.test_time_s, (self.time_limit_s / self.patience - self.test_time_s) / 2)
        for value in ("None", "object()"):
            lines, _ = self._run_texts(tests.stub_program(value), tests,
                                       tests.entry_point or CANDIDATE, time_s)
            verdicts = [line for line in lines if "test" in line]
            for line in verdicts:
                if "fault" in line:
                    return (f"test {line['test'] + 1} of {len(tests)} fails before it uses the program: "
                            f"{line['fault']}")
            if sum(line["passed"] for line in verdicts) < len(tests):
                return ""
        return "tests pass for programs whose functions do nothing"

    def _run_response(self, row: Row, tests: RowTests) -> tuple[list[bool], str, bool]:
        """Run the response's program; return (passed tests as far as they ran, first reason, whether time ran
        out)."""
        names = frozenset[str]() if tests.needs_entry_point else tests.names
        source = extract_program(get_text(row, "response"), names if tests.texts else None)
        # Lone surrogates cannot be sent to the sandbox.
        source = source.encode(errors="replace").decode()
        return self._call_functions(source, tests) if tests.texts else self._compare_outputs(source, tests)

    def _compare_outputs(self, source: str, tests: RowTests) -> tuple[list[bool], str, bool]:
        """Run the program once per test and compare its output."""
        passed: list[bool] = []
        why, too_slow = "", False
        taken_s = 0.0
        for stdin, expected in tests.runs:
            # After a timeout, stop if the next test might exceed the row's limit.
            if too_slow and self.time_limit_s - taken_s < self.patience * self.test_time_s:
                break
            outcome = self._run_program(Program(source, stdin=stdin), self.test_time_s,
                                        len(expected.encode(errors="replace")))
            # Waiting for a processor is not the program's fault.
            taken_s += outcome.wall_s - outcome.starved_s
            too_slow = too_slow or outcome.status == "timeout"
            right = outcome.status == "ok" and is_same_output(outcome.stdout, expected, tests.compare_by,
                                                              tests.number_tolerance)
            passed.append(right)
            if not right:
                why = why or outcome.reason or f"printed {format_short(outcome.stdout)}"
                # A single failure decides, so the other tests are skipped.
                if self.all_or_nothing:
                    break
        return passed, why, too_slow

    def _call_functions(self, source: str, tests: RowTests) -> tuple[list[bool], str, bool]:
        passed, entry_point = [False] * len(tests), tests.entry_point
        if tests.needs_entry_point and (functions := find_entry_points(source)) is not None:
            if len(functions) > 1:
                raise Refused(f"entry_point is missing, and the program has {', '.join(functions)}: name the "
                              "function that `check` gets")
            if not functions:
                return passed, "defines no function", False
            entry_point = functions[0]
        lines, outcome = self._run_texts(source, tests, entry_point, self.test_time_s)
        why, completed = "", False
        for line in lines:
            completed = completed or "done" in line or "loaded" in line
            if "test" in line:
                passed[line["test"]] = line["passed"]
            why = why or line.get("reason", "")
        # Without a final line, a crash or a limit ended the tests.
        why = why if completed else why or outcome.reason or "ended before its tests did"
        return passed, why, outcome.status == "timeout" or outcome.cpu_s >= self.test_time_s

    def _run_texts(self, source: str, tests: RowTests, entry_point: str, time_s: float
                   ) -> tuple[list[dict[str, Any]], Outcome]:
        """Run `solution_tests` on a program; return its output lines and the outcome."""
        request = json.dumps({"tests": tests.texts, "entry_point": entry_point,
                              "tolerance": tests.number_tolerance})
        program = Program(read_source(solution_tests.__name__), _add_length(source) + _add_length(request), {
            **{f"{'/'.join(parts)}/__init__.py": "" for parts in _PACKAGES},
            **{name.replace(".", "/") + ".py": read_source(name)
               for name in (solution_frameworks.__name__, solution_peer.__name__)}})
        outcome = self._run_program(program, time_s)
        # All lines come from `solution_tests`; the solution's own output is discarded.
        return [json.loads(line) for line in filter(None, outcome.stdout.split("\n"))], outcome

    def _run_program(self, program: Program, time_s: float, expected_bytes: int = 0) -> Outcome:
        """Run a program in the sandbox.

        Args:
            program: source and input.
            time_s: processor time.
            expected_bytes: size by which the output limit grows.

        Raises:
            RuntimeError: the machine failed.
            Refused: the sandbox rejects the program.
        """
        limits = Limits(wall_s=self.patience * time_s, cpu_s=time_s, memory_bytes=self.memory_bytes)
        # A long correct output must not be cut by the limit for wrong outputs.
        limits = replace(limits, output_bytes=limits.output_bytes + expected_bytes)
        outcome = self._get_sandbox().run(program, limits)
        if outcome.status == "infrastructure":
            raise RuntimeError(outcome.reason)
        if outcome.status == "refused":
            raise Refused(f"response and tests together: the program {outcome.reason}")
        return outcome

    def _get_sandbox(self) -> Sandbox:
        return shared_sandbox(self.enclosure, self.command)


_PACKAGES = [__name__.split(".")[:length] for length in (1, 2, 3)]


def _add_length(text: str) -> str:
    return f"{len(text.encode()):012d}{text}"
