"""A command with all processes that it starts, which end with the process that wanted it, however that ends.

Between the two stands a keeper, to which whatever loses its parent below it comes (PR_SET_CHILD_SUBREAPER of
prctl(2)): no group, session or daemon of its own saves a process from it.  It is a program of its own: a fork
of a trainer would hold on to the trainer's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_sov.work.processes.children import start_command

NOT_STARTED = 127
"""Exit code of a command that there is not, as a shell has it."""
_PR_SET_CHILD_SUBREAPER = 36
_AGAIN_S = 0.005
_LOOK_MS = 20


class KeptCommand:
    """A command that runs; it also ends when nobody has this any more."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO[Any]) -> None:
        """Start it.

        Args:
            command: program and arguments.
            environment: its own.
            output: where it writes all that it says.
        """
        until, wanted = os.pipe()  # its end is that of the command, however this process ends
        self._wanted = os.fdopen(wanted, "wb", buffering=0)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", __name__, str(until), *command], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[until],
                start_new_session=True)
        finally:
            os.close(until)

    @property
    def is_alive(self) -> bool:
        return self._keeper.poll() is None

    def end(self, patience_s: float = 0.0) -> None:
        """End it and all below it; after that many seconds without asking any more."""
        if patience_s and self.is_alive:
            self._keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(patience_s)
        # written and not only closed: a fork of this process may have the pipe too
        with contextlib.suppress(OSError, ValueError):
            self._wanted.write(b"\0")
        self._wanted.close()
        self._keeper.wait()


def kill_below() -> None:
    """Kill all below this process: a child that is killed hands its own children to it."""
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(_AGAIN_S)


def _children() -> list[int]:
    """Return the children that live; those that have ended are buried."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [*map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]


def _keep(until: int, command: Sequence[str]) -> int:
    """Wait until a command has ended, or nobody wants it any more; then end all that is left.

    Args:
        until: end of a pipe, which is told or closed when nobody wants it.
        command: program and arguments.

    Returns: its exit code.
    """
    os.set_inheritable(until, False)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    is_asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal is_asked
        is_asked = True
        leader.terminate()

    try:
        leader = start_command(command, ends_with_this=True)
    except OSError as e:
        print(f"{command[0]}: {e.strerror}", file=sys.stderr)
        return NOT_STARTED
    signal.signal(signal.SIGTERM, ask)
    watched = select.poll()
    for fd in (until, os.pidfd_open(leader.pid)):
        watched.register(fd, select.POLLIN)
    watched.poll()
    code = leader.poll()
    if is_asked and code is not None:
        # its children remove what they made in shared memory, if they are let
        watched = select.poll()
        watched.register(until, select.POLLIN)
        while _children() and not watched.poll(_LOOK_MS):
            pass
    kill_below()
    return 128 + signal.SIGKILL if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
