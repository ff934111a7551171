"""Child processes: how they end with their parent, what they may take, and forks that answer over a pipe.

No torch here.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable

from megatron_sov.errors import ExitCode
from megatron_sov.work.watch import OwnTime, Watch

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for a stop; the launcher passes them on to its ranks.  SIGUSR1 is what Slurm is asked to
send before the time limit."""
LOOK_EVERY_S = 0.25
"""At what a fork takes that has not answered yet."""
_PR_SET_PDEATHSIG = 1
_PRELOADED: dict[str, None] = {}
"""Modules of all forks, in order: they share one server."""


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed run leaves none behind."""
    _be_killed_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(ExitCode.CRASH)


def _be_killed_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit_bytes: int) -> None:
    """Let this process ask for no more memory than that, where a limit of the machine's is not lower; 0: no
    limit."""
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit_bytes and (hard_bytes == resource.RLIM_INFINITY or hard_bytes > limit_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_bytes))


def preload(modules: Iterable[str]) -> None:
    """Have the server of forks import modules, once for all that it forks, unless it has been started."""
    _PRELOADED.update(dict.fromkeys([__name__, *modules]))
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOADED])


class Fork:
    """A fork of a small server that has imported what such processes need and nothing else: one that was
    ended is replaced in a moment, and no thread of a caller's library is ever forked."""

    def __init__(self, work: Callable[..., None], arguments: tuple[object, ...], *,
                 may_start_processes: bool = False) -> None:
        """Start it.

        Args:
            work: a function of a module; called there with its end of the pipe and `arguments`.
            arguments: plain values.
            may_start_processes: False: of those that this process forgets to end, none outlives it.
        """
        context = multiprocessing.get_context("forkserver")
        self.pipe, there = context.Pipe()
        """This process's end."""
        self._process = context.Process(target=_begin, args=(there, work, arguments),
                                        daemon=not may_start_processes)
        self._process.start()
        there.close()
        assert self._process.pid is not None
        self._watch = Watch(self._process.pid)
        self.time = OwnTime(self._watch.totals, LOOK_EVERY_S)
        """Of its work, without what it waits for a processor."""

    def is_late(self, limit_s: float) -> bool:
        """Return whether it has taken that long since its time was begun."""
        now_s = time.monotonic()
        if now_s >= self.time.look_at_s:
            self.time.look(now_s)
        return self.time.own_s(now_s) >= limit_s

    def exit_code(self) -> int | None:
        """Return how it has ended, for which it may still need a processor."""
        self._process.join(timeout=60)
        return self._process.exitcode

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()
        self._watch.close()


def _begin(pipe: object, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Work as long as the server lives, which ends with the command; Ctrl-C is left to the command, which
    ends its processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_killed_with_parent()
    work(pipe, *arguments)
