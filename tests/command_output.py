"""Fixtures that run a command and return its output or its error."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.cli import main

Main = Callable[[list[str]], int]


@pytest.fixture
def cli_main() -> Main:
    """Return the program of `read_output` and `get_refusal`; folders of other programs override it."""
    return main


@pytest.fixture
def read_output(cli_main: Main, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return `read_output(*words)`: the output of a command, which must succeed."""
    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli_main(list(words)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def get_refusal(cli_main: Main, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return `get_refusal(*words)`: the errors of a command, which must end with code 2 and print nothing
    else."""
    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli_main(list(words)) == 2
        captured = capsys.readouterr()
        assert not captured.out and "Traceback" not in captured.err
        return captured.err

    return run


@pytest.fixture(scope="session")
def run_checked(run_command: Any) -> Callable[..., Any]:
    """Return `run_checked(*words, code=0)`: `run_command` of a command that must end with a code."""
    def run(*words: str, code: int = 0) -> Any:
        result = run_command(*words)
        assert result.returncode == code, result.stderr
        return result

    return run
