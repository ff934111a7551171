"""Commands in processes of their own.  No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, Any

from megatron_sov.base.errors import ExitCode
from megatron_sov.work.processes.children import FORWARDED, die_with_parent


def start_command(command: Sequence[str], *, stdout: IO[Any] | None = None,
                  stderr: IO[Any] | int | None = None, environment: Mapping[str, str] | None = None,
                  ends_with_this: bool = False, own_group: bool = False) -> subprocess.Popen[Any]:
    """Start a command that reads nothing.

    Args:
        command: program and arguments.
        stdout: where it writes; None: where this process does.
        stderr: likewise.
        environment: its own; None: this process's.
        ends_with_this: it is killed when this process ends.
        own_group: Ctrl-C of a terminal is not for it.

    Raises:
        OSError: it cannot be started.
    """
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment,
                            start_new_session=own_group,
                            preexec_fn=partial(die_with_parent, os.getpid()) if ends_with_this else None)


def end_commands(commands: Sequence[subprocess.Popen[Any]], wait_s: float) -> None:
    """Ask commands to end, and kill those that have not after that many seconds."""
    for command in commands:
        command.terminate()
    deadline_s = time.monotonic() + wait_s
    for command in commands:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(max(0.0, deadline_s - time.monotonic()))
        if command.poll() is None:
            command.kill()
            command.wait()


def run_command(argv: list[str], go_on_by: str) -> int:
    """Run `python -m ARGV` to its end and return its exit code, or that of a stop where this process was
    asked for one meanwhile: a command that was just ending may end well, and the next one must not begin.

    A signal that asks this process for a stop reaches the command, which saves everything; the command ends
    with this process.

    Args:
        argv: a module and its arguments.
        go_on_by: what a user does to go on after a stop.
    """
    child = start_command([sys.executable, "-m", *argv], ends_with_this=True)
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
