"""The `python` world: the observation for each way in which a program can end.

A double replaces the sandbox, which has its own tests in tests/sandbox.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.worlds import python as world
from megatron_sov.judge.tools.worlds.python import Python

OUTCOMES = {"print(1)": ("ok", "1\n", "", ""), "x": ("error", "", "NameError: x\n", "exit code 1"),
        "while 1: pass": ("timeout", "so far\n", "", "took longer than 10 s"),
        "full": ("infrastructure", "", "", "no space"), "\0": ("refused", "", "", "no program"),
        "pass": ("ok", "", "", "")}


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Python:
    """The world with a sandbox that returns the outcome of each program in `OUTCOMES`."""
    class FixedSandbox:
        def __init__(self, limits: Any) -> None:
            assert (limits.wall_s, limits.cpu_s, limits.memory_bytes) == (10, 10, 512 << 20)

        def run(self, program: Any) -> Any:
            status, stdout, stderr, reason = OUTCOMES[program.source]
            return SimpleNamespace(status=status, stdout=stdout, stderr=stderr, reason=reason)

    monkeypatch.setattr(world, "Sandbox", FixedSandbox)
    result = Python()
    result.reset(Python.EXAMPLES[0])
    return result


@pytest.mark.parametrize("program, output", [
    ("print(1)", "1"), ("x", "[stderr]\nNameError: x\n[error: exit code 1]"),
    ("while 1: pass", "so far\n[timeout: took longer than 10 s]"), ("pass", "[the program printed nothing]")])
def test_program_output_is_returned(python: Python, program: str, output: str) -> None:
    assert python.call("run_python", {"code": program}) == output


@pytest.mark.parametrize("program, code", [("full", "infrastructure"), ("\0", "refused")])
def test_a_broken_sandbox_is_not_the_programs_fault(python: Python, program: str, code: str) -> None:
    with pytest.raises(ToolFault) as caught:
        python.call("run_python", {"code": program})
    assert caught.value.code == code


def test_missing_sandbox_is_reported_before_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(limits: Any) -> Any:
        raise UserError("this machine cannot enclose a program")

    monkeypatch.setattr(world, "Sandbox", fail)
    with pytest.raises(UserError, match="cannot enclose"):
        Python().reset(Python.EXAMPLES[0])
