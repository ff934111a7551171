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


def run_command(argv: list[str]) -> int:
    """Run `python -m ARGV` to its end and return its exit code: that of a stop, where one was asked for.

    A signal that asks this process for a stop reaches the command, which saves everything; the command ends
    with this process.
    """
    process = subprocess.Popen([sys.executable, "-m", *argv],
                               preexec_fn=partial(die_with_parent, os.getpid()))
    asked_to_stop = False

    def forward(number: int, frame: Any) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        if number != signal.SIGINT:  # which a terminal sends to both
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked_to_stop:
        print("stopped; what is done is kept", file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
