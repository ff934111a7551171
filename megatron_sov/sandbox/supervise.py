"""Standing beside a program until it ends or passes a limit: its output, its time, what it takes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_sov.sandbox.program import Limits, Outcome, Status
from megatron_sov.work.processes.process_tree import ProcessTotals, WorkingTime

LOOK_EVERY_S = 0.05
"""At what all processes of a program take together."""
START_LIMIT_S = 600.0
"""For a process to be enclosed: milliseconds, unless the machine is busy."""
MAX_STARVED_S = 600.0
"""A program that has waited for a processor so long is given up, and nothing is known about it."""
_CHUNK_BYTES = 1 << 16
_TIME_LEFT_S = 1e-3


@dataclass
class Ends:
    """The supervisor's ends of a program's pipes; closed when it has ended."""

    stdin: int
    stdout: int
    stderr: int
    ready: int | None = None
    """Tells that the program begins; None: it has begun."""


@dataclass(frozen=True)
class SupervisedProgram:
    """A program as its supervisor sees it."""

    pid: int
    ends: Ends
    input: bytes
    """For its standard input."""
    limits: Limits
    kill: Callable[[], None]
    """Ends all of its processes."""
    wait: Callable[[], tuple[int, float]]
    """Returns its wait status and its seconds of processors, when they have been ended."""
    totals: Callable[[], ProcessTotals]
    """What they take together."""
    overfull: Callable[[], str] = field(default=lambda: "")
    """Why its files are too large; empty: they are not."""
    hangup: int | None = None
    """A socket to whoever waits for the outcome."""


class Gone(Exception):
    """Nobody waits for the outcome any more."""


def supervise(subject: SupervisedProgram) -> Outcome:
    """Return what becomes of a program; its processes have ended then.

    Raises:
        Gone: whoever asked for it has ended; so has the program.
    """
    return _Supervisor(subject).run()


class _Supervisor:
    """The state of one supervision."""

    def __init__(self, subject: SupervisedProgram) -> None:
        self._subject = subject
        self._poll = select.poll()
        # a file that becomes readable when the process ends: one poll waits for everything
        self._exit = os.pidfd_open(subject.pid)
        ends = subject.ends
        self._open: dict[int, bytearray] = {}
        """Pipe -> what came from it."""
        for fd in (ends.stdout, ends.stderr, ends.ready):
            if fd is not None:
                self._open[fd] = bytearray()
                self._poll.register(fd, select.POLLIN)
        self._came = dict(self._open)
        self._left = memoryview(subject.input)
        # a program that reads nothing must not stop its supervisor
        os.set_blocking(ends.stdin, False)
        self._poll.register(ends.stdin, select.POLLOUT)
        self._poll.register(self._exit, select.POLLIN)
        if subject.hangup is not None:
            self._poll.register(subject.hangup, select.POLLIN)
        self._began_s = time.monotonic()
        self._time = WorkingTime(subject.totals, LOOK_EVERY_S)
        self._ended = False
        self._passed: tuple[Status, str] | None = None
        """The limit that it has passed, and what to say about it."""

    def run(self) -> Outcome:
        subject = self._subject
        try:
            self._wait_for_end()
            wall_s = time.monotonic() - self._began_s
        finally:
            # always, also after a good end: what it started may still run, and would keep pipes open
            subject.kill()
            status, used_s = subject.wait()
            self._close()
        return self._outcome(status, wall_s, max(self._time.cpu_s, used_s))

    def _wait_for_end(self) -> None:
        while not self._ended and self._passed is None:
            now_s = time.monotonic()
            next_s = min(self._deadline_s(), self._time.look_at_s)
            if now_s >= next_s:
                self._look(now_s)
            self._serve(max(next_s - now_s, _TIME_LEFT_S))
            # one that has ended meanwhile is not late: the machine may be
            if now_s > self._deadline_s() and not self._ended:
                self._pass("timeout", f"took longer than {self._subject.limits.wall_s:g} s")
            elif self._time.starved_s > MAX_STARVED_S and not self._ended:
                self._pass("infrastructure", f"the machine is too busy: the program waited "
                                             f"{self._time.starved_s:.0f} s for a processor")
        if self._ended:
            self._drain()

    def _deadline_s(self) -> float:
        starting = self._subject.ends.ready in self._open
        return self._began_s + (START_LIMIT_S if starting else
                                self._subject.limits.wall_s + self._time.starved_s)

    def _serve(self, wait_s: float) -> None:
        for fd, _ in self._poll.poll(1000 * wait_s):
            if fd == self._exit:
                self._ended = True
            elif fd == self._subject.ends.stdin:
                self._write()
            elif fd == self._subject.hangup:
                raise Gone
            elif fd in self._open:
                self._read(fd)

    def _write(self) -> None:
        try:
            self._left = self._left[os.write(self._subject.ends.stdin, self._left[:_CHUNK_BYTES]):]
        except BlockingIOError:
            return
        except OSError:  # it reads no more
            self._left = self._left[:0]
        if not self._left:
            self._poll.unregister(self._subject.ends.stdin)
            os.close(self._subject.ends.stdin)
            self._subject.ends.stdin = -1

    def _read(self, fd: int) -> None:
        data = os.read(fd, _CHUNK_BYTES)
        came = self._open[fd]
        came += data
        if fd == self._subject.ends.ready:
            if data and not self._ended:  # being enclosed is not the program's time
                self._began_s = time.monotonic()
                self._time.begin()
            if not data:
                self._forget(fd)
            return
        most = self._subject.limits.output_bytes
        if len(came) > most:
            # the limit passed, the output up to it is kept
            del came[most:]
            self._pass("output", f"wrote more than {most:,} bytes to its standard "
                                 f"{'output' if fd == self._subject.ends.stdout else 'error'}")
        if not data:
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._open[fd]

    def _drain(self) -> None:
        """Read what is left: of processes that the first one left behind, nothing is waited for."""
        self._subject.kill()
        for fd in list(self._open):
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while fd in self._open and self._passed is None:
                    self._read(fd)

    def _look(self, now_s: float) -> None:
        """Compare what all processes take with the limits."""
        if self._subject.ends.ready in self._open:  # it is still being enclosed
            self._time.begin()
            return
        limits, totals = self._subject.limits, self._time.look(now_s)
        # the kernel limits each process; all together are watched from here
        if totals.memory_bytes > limits.memory_bytes:
            self._pass("memory", f"took more than {limits.memory_bytes:,} bytes of memory in "
                                 f"{totals.tasks} processes and threads")
        elif totals.cpu_s > limits.cpu_s:
            self._pass("timeout", f"took more than {limits.cpu_s:g} s of processors")
        elif totals.tasks > 2 * limits.processes:  # where the kernel refuses one more, it stays below that
            self._pass("killed", f"had {totals.tasks} processes and threads, more than {limits.processes}")
        elif reason := self._subject.overfull():
            self._pass("output", reason)

    def _pass(self, status: Status, reason: str) -> None:
        self._passed = self._passed or (status, reason)

    def _close(self) -> None:
        ends = self._subject.ends
        for fd in (self._exit, ends.stdin, ends.stdout, ends.stderr, ends.ready):
            if fd is not None and fd >= 0:
                os.close(fd)

    def _outcome(self, status: int, wall_s: float, cpu_s: float) -> Outcome:
        ends = self._subject.ends
        stdout, stderr = (self._came[fd].decode(errors="replace") for fd in (ends.stdout, ends.stderr))
        code = os.waitstatus_to_exitcode(status)
        told = b"." if ends.ready is None else bytes(self._came[ends.ready])
        if told != b".":
            why = told.decode(errors="replace") or f"it ended with {code} before"
            return Outcome("infrastructure", None, "", "", f"the program could not be enclosed: {why}",
                           wall_s, cpu_s)
        verdict, reason = self._passed or _ending(code, stderr, cpu_s, self._subject.limits)
        exit_code = None if self._passed or code < 0 else code
        return Outcome(verdict, exit_code, stdout, stderr, reason, wall_s, cpu_s, self._time.starved_s)


def _ending(code: int, stderr: str, cpu_s: float, limits: Limits) -> tuple[Status, str]:
    """Return the status, and its reason, of a program that passed no limit that is looked at from outside.

    Args:
        code: its exit code, or minus the signal that ended it.
        stderr: what it wrote.
        cpu_s: what it used.
        limits: which the kernel has kept for it.
    """
    if code == 0:
        return "ok", ""
    # the kernel sends SIGXCPU at the soft limit and SIGKILL at the hard one
    if -code == signal.SIGXCPU or (-code == signal.SIGKILL and cpu_s >= limits.cpu_s):
        return "timeout", f"took more than {limits.cpu_s:g} s of processors"
    if code < 0:
        return "killed", f"ended by {_signal_name(-code)}"
    last = stderr.rstrip().rpartition("\n")[2][:200]
    if last.startswith("MemoryError"):
        return "memory", f"was refused memory beyond {limits.memory_bytes:,} bytes"
    return "error", f"exit code {code}{last and ': '}{last}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
