"""A command in a process of its own: its exit code, and a stop that reaches it.  The commands here are
Python's own."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from megatron_sov.runs.commands import run_command


def test_a_command_ends_with_its_own_code() -> None:
    assert run_command(["timeit", "-n1", "-r1", "pass"]) == 0
    assert run_command(["timeit", "--no-such-option"]) == 2


def test_a_command_is_stopped_with_the_process_that_waits_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stop_when_it_runs() -> None:
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_when_it_runs)
    stopping.start()
    assert run_command(["timeit", "-n1", "-r1", "import time; time.sleep(60)"]) == 75
    stopping.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped; what is done is kept" in capfd.readouterr().err
