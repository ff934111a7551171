"""Commands of ours, one after the other, each in a process of its own.  No torch here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from typing import Any

from megatron_sov.errors import ExitCode
from megatron_sov.runs.parent_death import FORWARDED, die_with_parent


def run_command(argv: list[str], go_on_by: str) -> int:
    """Run `python -m ARGV` to its end and return its exit code, or that of a stop where this process was
    asked for one meanwhile: a command that was just ending may end well, and the next one must not begin.

    A signal that asks this process for a stop reaches the command, which saves everything; the command ends
    with this process.

    Args:
        argv: a module and its arguments.
        go_on_by: what a user does to go on after a stop.
    """
    child = subprocess.Popen([sys.executable, "-m", *argv], preexec_fn=partial(die_with_parent, os.getpid()))
    asked_to_stop = False

    def forward(number: int, frame: Any) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        if number != signal.SIGINT:  # which a terminal sends to both
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked_to_stop:
        print(f"stopped; {go_on_by}", file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
