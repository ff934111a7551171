"""Commands of ours, one after the other, each in a process of its own.  No torch here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from typing import Any

from megatron_sov.runs.parent_death import FORWARDED, die_with_parent


def run_command(argv: list[str]) -> int:
    """Run `megatron-sov ARGV` to its end and return its exit code.

    A signal that asks this process for a stop reaches the command, which saves everything; the command ends
    with this process.
    """
    command = [sys.executable, "-m", "megatron_sov", *argv]
    child = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))

    def forward(number: int, frame: Any) -> None:
        child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
