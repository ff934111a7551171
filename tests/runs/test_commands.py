"""A command in a process of its own: its exit code, and signals that reach it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_sov.runs import commands

CHILD = """
import os, signal, sys, time
if sys.argv[-1] == "code":
    sys.exit(3)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(0.3)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


def test_its_code_is_returned_and_signals_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    (tmp_path / "megatron_sov.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that came too early would end the tests
    try:
        assert commands.run_command(["code"]) == 3
        assert commands.run_command(["signal"]) == 75
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
