"""Total CPU time, memory and tasks of a process tree, read from /proc; kernel limits count per process."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

_TICKS_PER_S, _PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


@dataclass
class ProcessTotals:
    """Resource totals for a process and its descendants."""

    tasks: int = 0
    """Number of processes and threads."""
    cpu_s: float = 0.0
    """CPU seconds, including ended children that were waited for."""
    memory_bytes: int = 0
    """Resident memory without the pages shared with the fork server."""
    runnable: bool = False
    """Whether any process runs or waits for a CPU."""


class ProcessTreeUsage:
    """Reads the resource totals of a process tree.

    Args:
        root_pid: root process, as numbered in /proc.
        forks: count only descendants of `root_pid`, which is a fork server.
    """

    def __init__(self, root_pid: int, *, forks: bool = False) -> None:
        self._root, self._forks = root_pid, forks
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # /proc may become hidden
        # Subtract memory shared with the fork server instead of counting the pages once per fork.
        self._base_bytes = self._resident_bytes(root_pid) if forks else 0

    def follow_child(self) -> None:
        """Switch to the root's only child, which forks programs from now on."""
        ((self._root,), _) = self._read_children(self._root)
        self._base_bytes = self._resident_bytes(self._root)

    def close(self) -> None:
        os.close(self._proc)

    def totals(self) -> ProcessTotals:
        """Read the totals of the process and all descendants; a process that just ended adds nothing."""
        totals = ProcessTotals()
        queue = self._read_children(self._root)[0] if self._forks else [self._root]
        # a process reparented during the walk must not count twice
        visited: set[int] = set()
        while queue:
            pid = queue.pop()
            if pid in visited:
                continue
            visited.add(pid)
            try:
                children, threads = self._read_children(pid)
                fields = self._read_stat(f"{pid}/stat")
                totals.runnable = totals.runnable or fields[0] == "R" or any(
                    self._is_running(pid, thread) for thread in threads[1:])
                # utime and stime, own and of reaped children
                totals.cpu_s += sum(map(int, fields[11:15])) / _TICKS_PER_S
                totals.memory_bytes += max(0, self._resident_bytes(pid) - self._base_bytes)
            except (OSError, ValueError, IndexError):  # the process has just ended
                continue
            totals.tasks += len(threads)
            queue += children
        return totals

    def _read_children(self, pid: int) -> tuple[list[int], list[str]]:
        """Return a process's children and threads, main thread first."""
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
                children += map(int, self._read_proc_file(f"{pid}/task/{thread}/children").split())
            except OSError:
                continue
        return children, threads

    def _is_running(self, pid: int, thread: str) -> bool:
        try:
            return self._read_stat(f"{pid}/task/{thread}/stat")[0] == "R"
        except (OSError, IndexError):  # the thread has just ended
            return False

    def _read_stat(self, path: str) -> list[str]:
        """Return the fields of a `stat` file from the third on (state, ppid, ...); the name before may
        contain spaces and brackets."""
        return self._read_proc_file(path).rpartition(")")[2].split()

    def _resident_bytes(self, pid: int) -> int:
        return int(self._read_proc_file(f"{pid}/statm").split()[1]) * _PAGE_BYTES

    def _read_proc_file(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.read(fd, 1 << 16).decode(errors="replace")
        finally:
            os.close(fd)


class WorkingTime:
    """Wall time of a program minus waiting time for a CPU, for limits on busy machines.

    Args:
        totals: returns the current resource totals.
        every_s: interval between calls of `look`; a later call means that the caller had no CPU either.
    """

    def __init__(self, totals: Callable[[], ProcessTotals], every_s: float) -> None:
        self._totals, self._every_s = totals, every_s
        self.cpu_s = 0.0
        """CPU seconds at the last `look`."""
        self.begin()

    def begin_again(self) -> None:
        """Restart the measurement for a process that has worked before."""
        self.look(time.monotonic())
        self.begin()

    def begin(self) -> None:
        self._began_s = self._looked_s = time.monotonic()
        self._looker_s = time.thread_time()
        self.starved_s = 0.0

    @property
    def look_at_s(self) -> float:
        """Time of the next `look`, by the monotonic clock."""
        return self._looked_s + self._every_s

    def working_s(self, now_s: float) -> float:
        return now_s - self._began_s - self.starved_s

    def look(self, now_s: float) -> ProcessTotals:
        """Update the waiting time since the last call; return current resource totals."""
        totals, looker_s = self._totals(), time.thread_time()
        since_s, ran_s = now_s - self._looked_s, max(0.0, totals.cpu_s - self.cpu_s)
        # A late caller had no CPU itself, apart from its own work in between.
        late_s = since_s - self._every_s - (looker_s - self._looker_s)
        if totals.runnable:  # count the time since the last look without running process
            late_s = since_s
        # at most the time in which the program did not run
        self.starved_s += max(0.0, min(late_s, since_s - ran_s))
        self._looked_s, self._looker_s = now_s, looker_s
        # the sum decreases when a child ends without being reaped
        self.cpu_s = max(self.cpu_s, totals.cpu_s)
        return totals
