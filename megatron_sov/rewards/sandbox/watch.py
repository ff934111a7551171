"""What all processes of a program take together, read from /proc: limits of the kernel count each alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

_TICKS_PER_S, _PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


@dataclass
class Totals:
    """Of a process and all below it."""

    tasks: int = 0
    """Processes and threads."""
    cpu_s: float = 0.0
    """Seconds of processors, those of ended children included that were waited for."""
    memory_bytes: int = 0
    """Resident, beyond what each process shares with the server that it was forked from."""


class Watch:
    """Looks at the processes below one.

    Args:
        root_pid: the process above the program, as /proc counts it.
        forks: the program's processes are forks of it.
    """

    def __init__(self, root_pid: int, *, forks: bool = False) -> None:
        self._root = root_pid
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # it may vanish from view
        self._base_bytes = self._resident_bytes(root_pid) if forks else 0

    def close(self) -> None:
        """Give back what it holds."""
        os.close(self._proc)

    def totals(self) -> Totals:
        """Return the sums over all that is below the root now."""
        found = Totals()
        waiting = self._children(self._root)[0]
        seen: set[int] = set()
        while waiting:
            pid = waiting.pop()
            if pid in seen:
                continue
            seen.add(pid)
            try:
                children, num_threads = self._children(pid)
                # behind the name, which may hold anything, come state, ppid, ... from the third field on
                fields = self._read(f"{pid}/stat").rpartition(")")[2].split()
                found.cpu_s += sum(map(int, fields[11:15])) / _TICKS_PER_S
                found.memory_bytes += max(0, self._resident_bytes(pid) - self._base_bytes)
            except (OSError, ValueError, IndexError):  # it has just ended
                continue
            found.tasks += num_threads
            waiting += children
        return found

    def _children(self, pid: int) -> tuple[list[int], int]:
        """Return a process's children and its number of threads."""
        try:
            fd = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        except OSError:
            return [], 0
        try:
            threads = os.listdir(fd)
        finally:
            os.close(fd)
        children: list[int] = []
        for thread in threads:
            try:
                children += map(int, self._read(f"{pid}/task/{thread}/children").split())
            except OSError:
                continue
        return children, len(threads)

    def _resident_bytes(self, pid: int) -> int:
        return int(self._read(f"{pid}/statm").split()[1]) * _PAGE_BYTES

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.read(fd, 1 << 16).decode(errors="replace")
        finally:
            os.close(fd)
