"""What all processes of a program take together, read from /proc: limits of the kernel count each alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

_TICKS_PER_S, _PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


@dataclass
class ProcessTotals:
    """Of a process and all below it."""

    tasks: int = 0
    """Processes and threads."""
    cpu_s: float = 0.0
    """Seconds of processors, those of ended children included that were waited for."""
    memory_bytes: int = 0
    """Resident, beyond what each process shares with the server that it was forked from."""
    runnable: bool = False
    """One of them runs, or waits for nothing but a processor."""


class Watch:
    """Looks at the processes of a program.

    Args:
        root_pid: its first process, as /proc counts it.
        forks: the process that forks programs, instead: they are all that is below it.
    """

    def __init__(self, root_pid: int, *, forks: bool = False) -> None:
        self._root, self._forks = root_pid, forks
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # it may vanish from view
        # what all forks share with the server is no program's; counted once for each, it would exceed any
        # limit
        self._base_bytes = self._resident_bytes(root_pid) if forks else 0

    def follow_child(self) -> None:
        """Look at the only child of that process instead, which forks programs from now on."""
        ((self._root,), _) = self._children(self._root)
        self._base_bytes = self._resident_bytes(self._root)

    def close(self) -> None:
        os.close(self._proc)

    def totals(self) -> ProcessTotals:
        """Return the sums over all processes that are there now."""
        found = ProcessTotals()
        waiting = self._children(self._root)[0] if self._forks else [self._root]
        # a process that moves to another parent during the walk would be counted twice
        seen: set[int] = set()
        while waiting:
            pid = waiting.pop()
            if pid in seen:
                continue
            seen.add(pid)
            try:
                children, threads = self._children(pid)
                fields = self._fields(f"{pid}/stat")
                found.runnable = found.runnable or fields[0] == "R" or any(
                    self._runs(pid, thread) for thread in threads[1:])
                # utime, stime, and those of its children that have ended and were waited for
                found.cpu_s += sum(map(int, fields[11:15])) / _TICKS_PER_S
                found.memory_bytes += max(0, self._resident_bytes(pid) - self._base_bytes)
            except (OSError, ValueError, IndexError):  # it has just ended
                continue
            found.tasks += len(threads)
            waiting += children
        return found

    def _children(self, pid: int) -> tuple[list[int], list[str]]:
        """Return a process's children and its threads, the one that has its number first."""
        try:
            fd = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        except OSError:
            return [], []
        try:
            threads = sorted(os.listdir(fd), key=lambda thread: thread != str(pid))
        finally:
            os.close(fd)
        children: list[int] = []
        for thread in threads:
            try:
                children += map(int, self._read(f"{pid}/task/{thread}/children").split())
            except OSError:
                continue
        return children, threads

    def _runs(self, pid: int, thread: str) -> bool:
        try:
            return self._fields(f"{pid}/task/{thread}/stat")[0] == "R"
        except (OSError, IndexError):  # it has just ended
            return False

    def _fields(self, path: str) -> list[str]:
        """Return what stands in a `stat` from the third field on: state, ppid, ...; the name before may hold
        anything."""
        return self._read(path).rpartition(")")[2].split()

    def _resident_bytes(self, pid: int) -> int:
        return int(self._read(f"{pid}/statm").split()[1]) * _PAGE_BYTES

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.read(fd, 1 << 16).decode(errors="replace")
        finally:
            os.close(fd)


class OwnTime:
    """The time of a program by the clock, without that in which it waits for a processor: a limit that
    counts this does not end a program because its machine is busy.

    Args:
        totals: of its processes now.
        every_s: how often it is looked at; whoever looks later than that had no processor either.
    """

    def __init__(self, totals: Callable[[], ProcessTotals], every_s: float) -> None:
        self._totals, self._every_s = totals, every_s
        self.cpu_s = 0.0
        """When it was last looked at; the kernel tells in the end of those only that were waited for."""
        self.begin()

    def begin_again(self) -> None:
        """Count from now on, of a process that has worked before."""
        self.look(time.monotonic())
        self.begin()

    def begin(self) -> None:
        self._began_s = self._looked_s = time.monotonic()
        self._looker_s = time.thread_time()
        self.starved_s = 0.0

    @property
    def look_at_s(self) -> float:
        """When to look next, by the monotonic clock."""
        return self._looked_s + self._every_s

    def own_s(self, now_s: float) -> float:
        return now_s - self._began_s - self.starved_s

    def look(self, now_s: float) -> ProcessTotals:
        """Add what has passed since the last look; return what the program takes now."""
        totals, looker_s = self._totals(), time.thread_time()
        since_s, ran_s = now_s - self._looked_s, max(0.0, totals.cpu_s - self.cpu_s)
        # who looks too late was itself without a processor; its own work since then is not that
        late_s = since_s - self._every_s - (looker_s - self._looker_s)
        if totals.runnable:  # of the time since the last look, all in which none of them ran
            late_s = since_s
        # never more than the time in which the program did not run
        self.starved_s += max(0.0, min(late_s, since_s - ran_s))
        self._looked_s, self._looker_s = now_s, looker_s
        # the sum falls when a child has ended that nobody waited for
        self.cpu_s = max(self.cpu_s, totals.cpu_s)
        return totals
