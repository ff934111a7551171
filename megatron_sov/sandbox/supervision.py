"""Supervise a program until its end: feed input, collect output, and enforce limits."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_sov.sandbox.program import Limits, Outcome, Status
from megatron_sov.work.processes.process_tree import ProcessTotals, WorkingTime

CHECK_INTERVAL_S = 0.05
"""Interval between measurements of all processes of a program."""
START_LIMIT_S = 600.0
"""Time for enclosing a process: milliseconds on an idle machine."""
MAX_STARVED_S = 600.0
"""Waiting time for a processor after which the outcome is `infrastructure`."""
_CHUNK_BYTES = 1 << 16
_MIN_WAIT_S = 1e-3


@dataclass
class ProgramPipes:
    """The supervisor's ends of a program's pipes."""

    stdin: int
    stdout: int
    stderr: int
    ready: int | None = None
    """Reports that the program begins; None: the program runs already."""


@dataclass(frozen=True)
class SupervisedProgram:
    """A started program."""

    pid: int
    pipes: ProgramPipes
    """Closed after the program's end."""
    stdin: bytes
    limits: Limits
    kill: Callable[[], None]
    """Kills all processes of the program."""
    wait: Callable[[], tuple[int, float]]
    """Returns the wait status and the processor time in seconds, after `kill`."""
    totals: Callable[[], ProcessTotals]
    """Measures all processes of the program."""
    find_excess: Callable[[], str] = field(default=lambda: "")
    """Returns the reason why the program's files are too large; "" within the limits."""
    caller: int | None = None
    """Socket that becomes readable when the caller ends."""


class CallerGone(Exception):
    """The caller ended, so no process needs the outcome."""


def supervise_program(program: SupervisedProgram) -> Outcome:
    """Wait for a program's end or for a passed limit, kill all its processes and return the outcome. Raises
    `CallerGone`: the caller ended; the program is killed."""
    return _Supervisor(program).run()


class _Supervisor:
    def __init__(self, program: SupervisedProgram) -> None:
        self._program = program
        self._poll = select.poll()
        # readable at the process's end, so that a single poll waits for every event
        self._exit_fd = os.pidfd_open(program.pid)
        pipes = program.pipes
        self._open_pipes: dict[int, bytearray] = {}
        """Open pipe -> received bytes."""
        for fd in (pipes.stdout, pipes.stderr, pipes.ready):
            if fd is not None:
                self._open_pipes[fd] = bytearray()
                self._poll.register(fd, select.POLLIN)
        self._received = dict(self._open_pipes)
        self._unsent = memoryview(program.stdin)
        # a program that reads no input must not block the supervisor
        os.set_blocking(pipes.stdin, False)
        self._poll.register(pipes.stdin, select.POLLOUT)
        self._poll.register(self._exit_fd, select.POLLIN)
        if program.caller is not None:
            self._poll.register(program.caller, select.POLLIN)
        self._began_s = time.monotonic()
        self._time = WorkingTime(program.totals, CHECK_INTERVAL_S)
        self._has_ended = False
        self._violation: tuple[Status, str] | None = None
        """First passed limit: status and reason."""

    def run(self) -> Outcome:
        program = self._program
        try:
            self._wait_for_end()
            wall_s = time.monotonic() - self._began_s
        finally:
            # also after exit code 0: child processes may still run and keep the pipes open
            program.kill()
            status, cpu_s = program.wait()
            self._close_files()
        return self._build_outcome(status, wall_s, max(self._time.cpu_s, cpu_s))

    def _wait_for_end(self) -> None:
        while not self._has_ended and self._violation is None:
            now_s = time.monotonic()
            next_s = min(self._compute_deadline_s(), self._time.look_at_s)
            if now_s >= next_s:
                self._check_limits(now_s)
            self._handle_events(max(next_s - now_s, _MIN_WAIT_S))
            # a program that ended during the poll is in time, even if the machine is late
            if self._has_ended:
                break
            if now_s > self._compute_deadline_s():
                self._record_violation("timeout", f"took longer than {self._program.limits.wall_s:g} s")
            elif self._time.starved_s > MAX_STARVED_S:
                self._record_violation("infrastructure", f"the machine is too busy: the program waited "
                                                         f"{self._time.starved_s:.0f} s for a processor")
        if self._has_ended:
            self._drain_pipes()

    def _compute_deadline_s(self) -> float:
        if self._is_starting():
            return self._began_s + START_LIMIT_S
        return self._began_s + self._program.limits.wall_s + self._time.starved_s

    def _is_starting(self) -> bool:
        return self._program.pipes.ready in self._open_pipes

    def _handle_events(self, wait_s: float) -> None:
        for fd, _ in self._poll.poll(1000 * wait_s):
            if fd == self._exit_fd:
                self._has_ended = True
            elif fd == self._program.pipes.stdin:
                self._write_input()
            elif fd == self._program.caller:
                raise CallerGone
            elif fd in self._open_pipes:
                self._read_pipe(fd)

    def _write_input(self) -> None:
        pipes = self._program.pipes
        try:
            self._unsent = self._unsent[os.write(pipes.stdin, self._unsent[:_CHUNK_BYTES]):]
        except BlockingIOError:
            return
        except OSError:  # the program closed its standard input
            self._unsent = self._unsent[:0]
        if not self._unsent:
            self._poll.unregister(pipes.stdin)
            os.close(pipes.stdin)
            pipes.stdin = -1

    def _read_pipe(self, fd: int) -> None:
        data = os.read(fd, _CHUNK_BYTES)
        received = self._open_pipes[fd]
        received += data
        if fd == self._program.pipes.ready:
            if data and not self._has_ended:  # the program's time starts after the enclosing
                self._began_s = time.monotonic()
                self._time.begin()
        elif len(received) > (max_bytes := self._program.limits.output_bytes):
            del received[max_bytes:]
            stream = "output" if fd == self._program.pipes.stdout else "error"
            self._record_violation("output", f"wrote more than {max_bytes:,} bytes to its standard {stream}")
        if not data:
            self._poll.unregister(fd)
            del self._open_pipes[fd]

    def _drain_pipes(self) -> None:
        """Read the remaining output without waiting for child processes."""
        self._program.kill()
        for fd in list(self._open_pipes):
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while fd in self._open_pipes and self._violation is None:
                    self._read_pipe(fd)

    def _check_limits(self, now_s: float) -> None:
        """Compare the total resource usage, which the kernel does not limit."""
        if self._is_starting():
            self._time.begin()
            return
        limits, totals = self._program.limits, self._time.look(now_s)
        if totals.memory_bytes > limits.memory_bytes:
            self._record_violation("memory", f"took more than {limits.memory_bytes:,} bytes of memory in "
                                             f"{totals.tasks} processes and threads")
        elif totals.cpu_s > limits.cpu_s:
            self._record_violation("timeout", f"took more than {limits.cpu_s:g} s of processors")
        # twice the limit: below, the kernel refuses further processes
        elif totals.tasks > 2 * limits.processes:
            self._record_violation("killed", f"had {totals.tasks} processes and threads, more than "
                                             f"{limits.processes}")
        elif reason := self._program.find_excess():
            self._record_violation("output", reason)

    def _record_violation(self, status: Status, reason: str) -> None:
        self._violation = self._violation or (status, reason)

    def _close_files(self) -> None:
        pipes = self._program.pipes
        for fd in (self._exit_fd, pipes.stdin, pipes.stdout, pipes.stderr, pipes.ready):
            if fd is not None and fd >= 0:
                os.close(fd)

    def _build_outcome(self, wait_status: int, wall_s: float, cpu_s: float) -> Outcome:
        pipes = self._program.pipes
        exit_code = os.waitstatus_to_exitcode(wait_status)
        if pipes.ready is not None and self._received[pipes.ready] != b".":
            message = self._received[pipes.ready].decode(errors="replace")
            return Outcome("infrastructure", None, "", "", "the program could not be enclosed: "
                           f"{message or f'it ended with {exit_code} before'}", wall_s, cpu_s)
        stdout, stderr = (self._received[fd].decode(errors="replace") for fd in (pipes.stdout, pipes.stderr))
        status, reason = self._violation or _explain_exit(exit_code, stderr, cpu_s, self._program.limits)
        exited = self._violation is None and exit_code >= 0
        return Outcome(status, exit_code if exited else None, stdout=stdout, stderr=stderr, reason=reason,
                       wall_s=wall_s, cpu_s=cpu_s, starved_s=self._time.starved_s)


def _explain_exit(exit_code: int, stderr: str, cpu_s: float, limits: Limits) -> tuple[Status, str]:
    """Return status and reason of a program that passed no limit of `_check_limits`; a negative `exit_code`
    is a signal."""
    if exit_code == 0:
        return "ok", ""
    # the kernel sends SIGXCPU at the soft limit and SIGKILL at the hard limit
    if -exit_code == signal.SIGXCPU or (-exit_code == signal.SIGKILL and cpu_s >= limits.cpu_s):
        return "timeout", f"took more than {limits.cpu_s:g} s of processors"
    if exit_code < 0:
        return "killed", f"ended by {_format_signal(-exit_code)}"
    last_line = stderr.rstrip().rpartition("\n")[2][:200]
    if last_line.startswith("MemoryError"):
        return "memory", f"was refused memory beyond {limits.memory_bytes:,} bytes"
    separator = ": " if last_line else ""
    return "error", f"exit code {exit_code}{separator}{last_line}"


def _format_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
