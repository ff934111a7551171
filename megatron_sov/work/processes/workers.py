"""Worker processes for requests with a time limit; ended workers are replaced.

Workers are forks of a server process that has imported the needed modules and nothing else: replacement is
fast, and no thread of the caller's libraries is ever forked.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from typing import Any, TypeVar

from megatron_sov.base.errors import UserError
from megatron_sov.work.processes.channel import receive_message, send_message
from megatron_sov.work.processes.children import Child, set_parent_death_signal
from megatron_sov.work.processes.process_tree import ProcessTreeUsage, WorkingTime

CHECK_EVERY_S = 0.25
"""Interval between resource checks of a busy worker."""
START_LIMIT_S = 120.0
"""Limit for importing modules and building the answer function."""
END_LIMIT_S = 60.0
"""Limit for the kernel to report a worker's exit code."""
FAST_REQUEST_S, MAX_BATCH_REQUESTS = 0.01, 64
"""Requests faster than `FAST_REQUEST_S` are sent in batches of up to `MAX_BATCH_REQUESTS`."""
_PRELOADED: dict[str, None] = {}
"""Modules that the shared fork server imports, in order."""
Key = TypeVar("Key")
Answer = Callable[[Any, Callable[[], None]], Any]
"""Answers a request: called with the request and a function to restart the time limit; returns JSON."""


class _WorkerProcess(Child):
    def __init__(self, make: Callable[..., Answer], arguments: tuple[object, ...],
                 may_start_processes: bool) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # the fork server has no threads: a fork of this process could inherit a held lock
            process = multiprocessing.get_context("forkserver").Process(
                target=_run_worker, args=(theirs, make, arguments), daemon=not may_start_processes)
            process.start()

        def wait(within_s: float | None) -> int | None:
            process.join(within_s)
            return process.exitcode

        super().__init__(ours, process.kill, wait)
        ours.settimeout(START_LIMIT_S)  # for the rest of a started message
        assert process.pid is not None
        self._watch = ProcessTreeUsage(process.pid)
        self._time = WorkingTime(self._watch.totals, CHECK_EVERY_S)
        """Working time without waiting for a CPU."""
        self.limit_s = START_LIMIT_S
        self.is_ready = False
        self.queue: deque[tuple[Any, Any]] = deque()
        """Sent (key, request) pairs without an answer; the worker is at the first."""
        self.batch_size = 1
        """Batch size for requests."""
        self._num_given, self._given_s = 0, 0.0

    @property
    def look_at_s(self) -> float:
        return self._time.look_at_s

    def begin_again(self) -> None:
        self._time.begin_again()

    def give(self, requests: Sequence[tuple[Any, Any]], limit_s: float) -> None:
        """Send requests, each to be answered within `limit_s` seconds, in order."""
        self.queue.extend(requests)
        self.limit_s, self._num_given, self._given_s = limit_s, len(requests), time.monotonic()
        self.begin_again()
        with contextlib.suppress(OSError):  # the worker has just ended; the next poll reports it
            send_message(self.channel, [request for _, request in requests])

    def pop_answered(self) -> Any:
        """Remove the answered request from the queue; return its key."""
        key, _ = self.queue.popleft()
        if self.queue:
            # skip reading totals: earlier answers in the batch took little time
            self._time.begin()
        else:
            is_quick = time.monotonic() - self._given_s <= FAST_REQUEST_S * self._num_given
            self.batch_size = min(2 * self.batch_size, MAX_BATCH_REQUESTS) if is_quick else 1
        return key

    def is_late(self) -> bool:
        now_s = time.monotonic()
        if now_s >= self._time.look_at_s:
            self._time.look(now_s)
        # a worker that has answered meanwhile is not late
        return self._time.working_s(now_s) >= self.limit_s and not connection.wait([self.channel], 0)

    def end(self) -> None:
        super().end()
        self._watch.close()


@dataclass(frozen=True)
class LostAnswer:
    exit_code: int | None
    """Exit code of the worker; None after a timeout."""


class Workers:
    """Worker processes for requests; `answers` yields results, `end` stops the workers.

    They end with this process, and so do their children unless `may_start_processes`.
    """

    def __init__(self, name: str, make: Callable[..., Answer], arguments: tuple[object, ...], *,
                 num: int = 1, modules: Iterable[str] = (), most_bytes: int | None = None,
                 may_start_processes: bool = False) -> None:
        """Configure workers without starting them.

        Args:
            name: purpose of the workers, for messages.
            make: module-level function, called in each worker with `arguments`; returns the `Answer`
                function. A `UserError` from either ends the work.
            arguments: plain values.
            num: number of workers.
            modules: modules to import once in the fork server.
            most_bytes: maximum answer size; None: unlimited.
            may_start_processes: allow child processes; without, no descendant outlives this process.
        """
        self._name, self._make, self._arguments, self._num = name, make, arguments, num
        self._most_bytes, self._may_start_processes = most_bytes, may_start_processes
        self._workers: list[_WorkerProcess] = []
        # All workers share a server: it imports modules known before its start; later ones are imported per
        # fork.
        _PRELOADED.update(dict.fromkeys([__name__, make.__module__, *modules]))
        multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOADED])

    def answers(self, waiting: deque[tuple[Key, Any]], limit_s: float) -> Iterator[tuple[Key, Any]]:
        """Yield (key, answer) on completion; an answer may be `LostAnswer`.

        Args:
            waiting: queue of (key, request); the caller may append until all are answered.
            limit_s: seconds per answer, not counting waits for a CPU.

        Raises:
            UserError: `make` or the answer function failed with it, or a process cannot be started.
        """
        try:
            while waiting or any(worker.queue for worker in self._workers):
                self._send_requests(waiting, limit_s)
                busy = [worker for worker in self._workers if worker.queue or not worker.is_ready]
                # sleep until a message arrives or a worker's resources are due for a check
                remaining_s = min(worker.look_at_s for worker in busy) - time.monotonic()
                ready_channels = connection.wait([worker.channel for worker in busy], max(remaining_s, 0.0))
                for worker in busy:
                    if worker.channel in ready_channels or worker.is_late():
                        for answer in self._receive_answers(worker, worker.channel in ready_channels):
                            key = worker.pop_answered()
                            if isinstance(answer, LostAnswer):  # requeue the other requests in the batch
                                waiting.extendleft(reversed(worker.queue))
                            yield key, answer
        finally:
            # a busy worker would send its answer to the next caller
            for worker in [worker for worker in self._workers if worker.queue]:
                self._stop_worker(worker)

    def _send_requests(self, waiting: deque[tuple[Key, Any]], limit_s: float) -> None:
        num_needed = len(waiting) + sum(bool(worker.queue) for worker in self._workers)
        while len(self._workers) < min(self._num, num_needed):
            self._workers.append(_WorkerProcess(self._make, self._arguments, self._may_start_processes))
        for worker in self._workers:
            if waiting and worker.is_ready and not worker.queue:
                count = min(worker.batch_size, -(-len(waiting) // self._num))
                worker.give([waiting.popleft() for _ in range(count)], limit_s)

    def _receive_answers(self, worker: _WorkerProcess, has_sent: bool) -> list[Any]:
        """Return [answer] from a worker with a message or a timeout, or []."""
        code: int | None = None
        try:
            if has_sent:
                kind, value = receive_message(worker.channel, self._most_bytes)
                if kind == "answer":
                    return [value]
                if kind == "problem":
                    self._stop_worker(worker)
                    raise UserError(value)
                # "ready" or "again": restart the time limit
                worker.is_ready = True
                worker.begin_again()
                return []
        except TimeoutError:
            pass
        except (EOFError, OSError):
            code = worker.exit_code(END_LIMIT_S) or 0
        except (ValueError, TypeError):  # invalid or oversized answer
            code = -signal.SIGKILL
        self._stop_worker(worker)
        if worker.is_ready:
            return [LostAnswer(code)]
        if code is None:
            raise UserError(f"a process of {self._name} has not started within {START_LIMIT_S:g} s; "
                            "give the machine less to do, or look at what it does when it is made")
        raise UserError(f"a process of {self._name} ended while it started (exit code {code}); see what it "
                        "wrote above")

    def _stop_worker(self, worker: _WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.end()

    def end(self) -> None:
        for worker in [*self._workers]:
            self._stop_worker(worker)


def _run_worker(channel: socket.socket, make: Callable[..., Answer], arguments: tuple[object, ...]) -> None:
    """Serve requests until the fork server ends; ignore Ctrl-C, because the main process ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal()
    # The fork server ends when nobody holds this pipe open. A worker that inherits the pipe would keep both
    # alive after the command is killed.
    shared: Any = forkserver._forkserver
    if shared._forkserver_alive_fd is not None:
        os.close(shared._forkserver_alive_fd)
        shared._forkserver_alive_fd = None
    serve_requests(channel, make, arguments)


def serve_requests(channel: socket.socket, make: Callable[..., Answer],
                   arguments: tuple[object, ...]) -> None:
    """Answer requests until the other side closes the channel."""
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            answer = make(*arguments)
            send_message(channel, ("ready", ""))
            while True:
                for request in receive_message(channel):
                    # separate answers: if the process dies, the first unanswered request is the cause
                    send_message(channel,
                                 ("answer", answer(request, lambda: send_message(channel, ("again", "")))))
        except UserError as e:
            send_message(channel, ("problem", str(e)))
