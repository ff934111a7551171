"""The Python of the virtual cluster's jobs does what Python does: streams, codes, signals and ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ATTEMPTS = ("-P", "-m", "megatron_sov.operate.slurm.attempts", "begin")
"""It ends when its standard input does, and not before."""


def asked(folder: Path) -> tuple[str, ...]:
    return (*ATTEMPTS, "records", "--target", "target", "--done", str(folder / "done"), "--max-failures=1",
            "--max-strikes=1", "--min-nodes=1", "--nodes=n1")


@pytest.mark.parametrize("words", [("-P", "-m", "megatron_sov", "recipes"),
                                   ("-P", "-m", "megatron_sov", "pretend"),
                                   ("-c", "import sys; sys.exit('why')")])
def test_output_and_exit_code_are_pythons(warm_python: str, words: tuple[str, ...]) -> None:
    ours, pythons = (subprocess.run([program, *words], capture_output=True, text=True, check=False)
                     for program in (warm_python, sys.executable))
    assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout)
    assert ours.stderr.splitlines()[-1:] == pythons.stderr.splitlines()[-1:]


def test_a_fork_has_the_callers_folder_variables_and_input(warm_python: str, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    done = subprocess.run([warm_python, *asked(tmp_path)], cwd=tmp_path, env=environment, text=True,
                          input="7 RUNNING\n", capture_output=True, check=True)
    assert done.stdout == "run\n" and "attempt 1 begins on n1" in done.stderr
    assert (tmp_path / "records/attempts.jsonl").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_ends_the_fork_and_is_how_the_caller_ends(warm_python: str, tmp_path: Path,
                                                           number: signal.Signals, until: Any) -> None:
    """Nobody reads the input any more: the fork is gone too."""
    (tmp_path / "records").mkdir()
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    with subprocess.Popen([warm_python, *asked(tmp_path)], cwd=tmp_path, env=environment,
                          stdin=subprocess.PIPE) as client:
        assert client.stdin is not None
        reads = select.poll()
        reads.register(client.stdin, select.POLLERR)
        with pytest.raises(TimeoutError):
            until(lambda: reads.poll(0), 0.5, "an end that nobody asked for")
        client.send_signal(number)
        assert client.wait(600) == -number
        until(lambda: reads.poll(0), 600, "the end of the fork")
