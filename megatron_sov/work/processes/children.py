"""Child processes: how they end with their parent, what they may take, and how they are talked to.

A child has a socket to this process, for messages of JSON (`work.channel`): nothing that it sends is ever
unpickled.  It is an interpreter of its own, or a fork of a small server (`work.workers`).  No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO

from megatron_sov.base.errors import ExitCode

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for a stop; the launcher passes them on to its ranks.  SIGUSR1 is what Slurm is asked to
send before the time limit."""
MAX_MEMORY_BYTES = 4 << 30
"""Of address space, for a process that works with what names no `MAX_MEMORY_BYTES` of its own."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed run leaves none behind."""
    be_killed_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(ExitCode.CRASH)


def be_killed_with_parent() -> None:
    """Ask Linux for that of a fork whose parent is alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit_bytes: int = MAX_MEMORY_BYTES) -> None:
    """Let this process ask for no more memory than that, where a limit of the machine's is not lower; 0: no
    limit."""
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit_bytes and (hard_bytes == resource.RLIM_INFINITY or hard_bytes > limit_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_bytes))


class Child:
    """A process at the other end of a socket, which ends at the latest when nobody has this any more."""

    def __init__(self, channel: socket.socket, kill: Callable[[], None],
                 wait: Callable[[float | None], int | None], patience_s: float = 0.0) -> None:
        """Take it over.

        Args:
            channel: this end.
            kill: ends it.
            wait: returns its exit code, or minus its signal; None: it has not ended in so many seconds.
            patience_s: in which it may end by itself, and remove what it made, when its channel is closed.
        """
        self.channel, self._wait = channel, wait
        self._end = weakref.finalize(self, _end, channel, kill, wait, patience_s, os.getpid())

    def exit_code(self, within_s: float) -> int | None:
        """Return how it has ended, for which it may still need a processor; None: it has not."""
        return self._wait(within_s)

    def end(self) -> None:
        """End it, whatever it does."""
        self._end()


def _end(channel: socket.socket, kill: Callable[[], None], wait: Callable[[float | None], int | None],
         patience_s: float, owner: int) -> None:
    channel.close()
    if os.getpid() != owner:  # a fork of the process that started it
        return
    if not patience_s or wait(patience_s) is None:
        with contextlib.suppress(ProcessLookupError):
            kill()
        wait(None)


def start_interpreter(command: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str], *,
                      errors: IO[bytes] | int = subprocess.DEVNULL, patience_s: float = 0.0) -> Child:
    """Start a program with nothing but a socket, whose number is its first argument.

    Args:
        command: an interpreter and what it runs.
        arguments: behind the socket's number.
        variables: of its environment, beside the few that every program needs.
        errors: where it writes what goes wrong.
        patience_s: see `Child`.
    """
    ours, theirs = socket.socketpair()
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1", **variables,
                   **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}}
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), *arguments], env=environment, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[theirs.fileno()],
            start_new_session=True)
    return Child(ours, process.kill, partial(_waited, process), patience_s)


def _waited(process: subprocess.Popen[bytes], within_s: float | None) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    return process.returncode
