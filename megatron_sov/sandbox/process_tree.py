"""A command with all processes that it starts, which end with it and with the process that wanted it.

Between the two stands a keeper, to which whatever loses its parent below it comes (PR_SET_CHILD_SUBREAPER of
prctl(2)): no group, session or daemon of its own saves a process from it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import IO, NoReturn

from megatron_sov.sandbox import system_calls as sc
from megatron_sov.work.processes.supervisor import kill_descendants


class ProcessTree:
    """A command that runs, with its pipes."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start it.

        Args:
            command: program and arguments.
            variables: its whole environment.

        Raises:
            OSError: there is no such program.
        """
        until, self._wanted = os.pipe()  # its end is that of the tree, however this process ends
        try:
            self._keeper = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, preexec_fn=lambda: _be_kept(until))
        except BaseException:
            os.close(self._wanted)
            raise
        finally:
            os.close(until)
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self.stdin, self.stdout = self._keeper.stdin, self._keeper.stdout

    def end(self, grace_s: float = 0.0) -> None:
        """End the command and all that it started.

        Args:
            grace_s: seconds in which it may end by itself, once its input has.
        """
        if grace_s:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.stdin.close()
                self._keeper.wait(grace_s)
        os.close(self._wanted)
        self._keeper.wait()
        self.stdout.close()
        with contextlib.suppress(OSError):  # what it did not read is still to be written
            self.stdin.close()


def _be_kept(until: int) -> None:
    """Go on as the command, in a child of a keeper that this process becomes."""
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    # this process becomes the keeper, its child the command: orphans of the command come to the keeper
    pid = os.fork()
    if pid:
        _keep(pid, until)
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


def _keep(pid: int, until: int) -> NoReturn:
    """Wait until the command has ended, or nobody wants it any more; then end all that is left."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
        ended = os.pidfd_open(pid)
        # the command's pipes have to end with the command, and `until` with who wanted it
        # every file but the two: an open end of a pipe here would keep readers waiting for ever
        for below, above in pairwise((-1, *sorted((until, ended)), os.sysconf("SC_OPEN_MAX"))):
            os.closerange(below + 1, above)
        watched = select.poll()
        for fd in (until, ended):
            watched.register(fd, select.POLLIN)
        watched.poll()
        kill_descendants()
    finally:
        os._exit(0)
