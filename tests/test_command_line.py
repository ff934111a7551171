"""What all programs do alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sov.command_line import exit_code
from megatron_sov.errors import GateFailed, StopRequested, UserError
from megatron_sov.version import __version__

ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-tokenizer": "tokenizer.cli", "sov-data": "data_prep.cli"}


@pytest.mark.parametrize("program", ENTRIES)
def test_every_program_tells_its_version(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", ENTRIES[program], "--version"], capture_output=True,
                          text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{program} {__version__}\n", "")


@pytest.mark.parametrize(("outcome", "code", "said"), [
    (7, 7, ""), (UserError("a: is b"), 2, "error: a: is b\n"), (GateFailed("too low"), 3, "gate: too low\n"),
    (StopRequested("saved"), 75, "stopped: saved\n"), (BrokenPipeError(), 0, ""),
    (OSError(36, "File name too long", "x" * 9999), 2, f"error: {'x' * 300}: cannot be used (File name too "
     "long); look at the path, its permissions and its disk\n"),
])
def test_what_a_user_can_mend_is_one_message_and_a_code(
    outcome: int | Exception, code: int, said: str, capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert exit_code(action) == code
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
    with pytest.raises(OSError):
        exit_code(lambda: os.close(10 ** 6))  # type: ignore[func-returns-value]
