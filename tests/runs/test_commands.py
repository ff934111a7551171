"""A command in a process of its own: its exit code, and signals that reach it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_sov.runs import commands

CHILD = """
import os, re, signal, sys, time
if sys.argv[-1] == "code":
    sys.exit(3)
asked = []
for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: (asked.append(number), print("asked by", number, flush=True)))
number = getattr(signal, sys.argv[-1])
def is_awaited():
    caught = re.search("SigCgt:(.*)", open(f"/proc/{os.getppid()}/status").read())[1]
    return int(caught, 16) >> (number - 1) & 1
while not is_awaited():
    time.sleep(0.01)
os.kill(os.getppid(), number)
if number == signal.SIGINT:
    time.sleep(0.3)
while number != signal.SIGINT and not asked:
    time.sleep(0.01)
"""


def test_its_code_is_returned_and_a_stop_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
                                                      ) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # one that came too early would end the tests
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGINT)}
    try:
        assert commands.run_command(["child", "code"], "x") == 3
        assert capfd.readouterr() == ("", "")
        # the command ends well, and none may follow it
        assert commands.run_command(["child", "SIGUSR1"], "continue with --resume") == 75
        assert capfd.readouterr() == (f"asked by {int(signal.SIGUSR1)}\n",
                                      "stopped; continue with --resume\n")
        # a terminal has sent it to the command, too
        assert commands.run_command(["child", "SIGINT"], "x") == 75
        assert capfd.readouterr().out == ""
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
