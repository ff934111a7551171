"""A fleet: inference servers with a shared request queue.

A request goes to the server with the most free capacity. If a server dies, its requests return to the head of
the queue, and the server is restarted with the newest weights. Weight updates pause all servers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from megatron_sov.base.errors import UserError, warn
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest
from megatron_sov.work.endpoints.vllm_server import VllmServer

LOOK_S = 1.0
"""Seconds between health checks."""
SILENT_S = 60.0
"""Seconds without a successful health check after which a server counts as dead."""
BACKOFF_S = (1.0, 60.0)
"""Minimum and maximum restart delay in seconds; the delay doubles with each restart."""
ENDED = "the engine servers have been ended"
ATTEMPTS = 8
"""Attempts per request, summed over servers."""


class Fleet:
    """Servers and their request queue; as a context manager, `Fleet` stops the servers at the end.

    Args:
        keepers: one per server, at least one.
        vocab_size: exclusive limit of token ids; a larger id may crash a server.
        requests: limit of answers in progress per server.
        restarts: limit of starts without an answer in between.
        over: event that stops the fleet, also during its start.
        look_s: interval of health checks.
        backoff_s: minimum and maximum delay before a restart.
    """

    def __init__(self, keepers: Sequence[ServerKeeper], vocab_size: int, requests: int, restarts: int = 5, *,
                 over: threading.Event | None = None, look_s: float = LOOK_S,
                 backoff_s: tuple[float, float] = BACKOFF_S) -> None:
        self._members = [_Member(number, keeper) for number, keeper in enumerate(keepers)]
        self.requests, self._vocab_size, self._restarts = requests, vocab_size, restarts
        self._look_s, self._backoff_s = look_s, backoff_s
        self._waiting: deque[_Task] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._assigned: SimpleQueue[tuple[_Member, _Task] | None] = SimpleQueue()
        self._num_idle = 0
        """Threads waiting for an unassigned task."""
        self._weights: WeightUpdate | None = None
        self._over, self._is_paused = over or threading.Event(), False
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Fleet:
        for member in self._members:
            self._start_thread(partial(self._watch_server, member))
        try:
            # a single server is enough to start; slower servers join when healthy
            self._wait_for(lambda: any(member.server is not None for member in self._members))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers started here and fail the pending tasks."""
        with self._changed:
            self._over.set()
            pending = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in pending:
            _set_result(task, RuntimeError(ENDED))
        for _ in self._threads:
            self._assigned.put(None)
        with ThreadPoolExecutor(len(self._members)) as pool:
            list(pool.map(lambda member: member.keeper.end(), self._members))
        # threads that wait for a user's server may continue, as daemons
        for thread in self._threads:
            thread.join(timeout=self._look_s)

    @property
    def num_servers(self) -> int:
        return len(self._members)

    @property
    def _is_over(self) -> bool:
        return self._over.is_set()

    def submit(self, request: TokenRequest) -> Future[list[TokenAnswer]]:
        """Enqueue a request; the future is running once a server has the request. Raises `UserError`: a token
        id is outside the vocabulary, or no server can be restarted."""
        if not all(ids and min(ids) >= 0 and max(ids) < self._vocab_size for ids in request.prompts):
            raise UserError(f"request {request.name}: has no token ids, or ids outside the model's "
                            f"vocab_size = {self._vocab_size}, which would crash the server")
        task = _Task(request, Future())
        with self._changed:
            self._check_running()
            self._waiting.append(task)
            self._dispatch_tasks()
        return task.future

    def abort(self, names: Sequence[str]) -> None:
        """Abort requests; their futures get partial answers, possibly empty."""
        aborted_names = set(names)
        with self._changed:
            aborted = [task for task in self._waiting if task.request.name in aborted_names]
            for task in aborted:
                self._waiting.remove(task)
            running = {member: [task for name, task in member.under_way.items() if name in aborted_names]
                       for member in self._members}
            for tasks in running.values():
                for task in tasks:
                    task.is_aborted = True
        for task in aborted:
            _set_result(task, _empty_answers(task))
        for member, tasks in running.items():
            if tasks and (server := member.server) is not None:
                try:
                    server.abort([task.request for task in tasks])
                except (BadAnswer, TimeoutError) as e:
                    # either the full answers arrive, or the health check finds the server dead
                    warn(f"{server.url}: does not abort ({e})")

    def update(self, files: Sequence[str], version: int) -> None:
        """Update the weights on every server; requests in progress continue with the new weights.

        Args:
            files: safetensors files, which restarted servers read until the next update.
            version: version of the weights.

        Raises:
            UserError: no server has the new weights.
        """
        with self._changed:
            self._weights, self._is_paused = WeightUpdate(tuple(files), version), True
        try:
            with ThreadPoolExecutor(len(self._members)) as pool:
                list(pool.map(self._update_server, self._members))
        finally:
            with self._changed:
                self._is_paused = False
                self._dispatch_tasks()
        self._wait_for(lambda: any(m.server is not None and m.version == version for m in self._members))

    def score(self, ids: Sequence[int]) -> list[list[float]]:
        """Return a text's token scores from each running server; unresponsive servers are skipped."""
        scores = []
        for server in [member.server for member in self._members if member.server is not None]:
            try:
                scores.append(server.score(ids))
            except (BadAnswer, TimeoutError) as e:
                warn(f"{server.url}: cannot score a text ({e})")
        return scores

    def _start_thread(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._run_thread, args=(work,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_thread(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            # callers get the error from their futures or at the next call
            self._fail_tasks(e)

    def _fail_tasks(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            running = [task for member in self._members for task in member.under_way.values()]
            pending = [*self._waiting, *running]
            self._waiting.clear()
            self._changed.notify_all()
        for task in pending:
            _set_result(task, self._failure)

    def _check_running(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_over:
            raise RuntimeError(ENDED)

    def _wait_for(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            while not holds():
                self._check_running()
                self._changed.wait(self._look_s)

    def _watch_server(self, member: _Member) -> None:
        """Check a server's health and restart dead servers until the fleet stops."""
        last_seen_s = time.monotonic()
        while not self._is_over:
            if member.server is None:
                self._start_server(member)
                last_seen_s = time.monotonic()
            elif not member.keeper.is_alive():
                self._drop_server(member, "its process has ended")
            elif member.server.is_healthy():
                last_seen_s = time.monotonic()
            elif time.monotonic() - last_seen_s > SILENT_S:
                self._drop_server(member, f"it has not answered for {SILENT_S:g} s")
            with self._changed:
                if not self._is_over and member.server is not None:
                    self._changed.wait(self._look_s)

    def _start_server(self, member: _Member) -> None:
        if member.num_starts:
            wait_s = min(self._backoff_s[0] * 2 ** (member.num_starts - 1), self._backoff_s[1])
            with self._changed:
                self._changed.wait_for(lambda: self._is_over, wait_s)
        if member.num_starts > self._restarts:
            raise UserError(f"engine server {member.number} has died {member.num_starts} times without an "
                            "answer in between; see its log")
        member.num_starts += 1
        with member.changing:
            server = member.keeper.start(lambda: self._is_over)
            if server is None:
                return
            member.version = None
            try:
                self._send_weights(member, server)
            except (BadAnswer, TimeoutError) as e:
                warn(f"{server.url}: rejected the weights ({e}); restarting it")
                return
            with self._changed:
                member.server = server
                self._changed.notify_all()
                self._dispatch_tasks()

    def _drop_server(self, member: _Member, why: str) -> None:
        """Mark a server as dead; its requests return to the queue."""
        with self._changed:
            server, member.server = member.server, None
        if server is not None:
            warn(f"{server.url}: {why}; its requests move to other servers, and it is restarted")

    def _update_server(self, member: _Member) -> None:
        with member.changing:
            if (server := member.server) is None:
                return
            try:
                self._send_weights(member, server)
            except (BadAnswer, TimeoutError) as e:
                self._drop_server(member, f"rejected the weights ({e})")

    def _send_weights(self, member: _Member, server: VllmServer) -> None:
        weights = self._weights
        if weights is None or member.version == weights.version:
            return
        try:
            server.pause()
            server.update(weights.files, weights.version)
            server.resume()
        except RequestRefused as e:
            if "HTTP 404" not in str(e):  # with the routes, an update may succeed after a restart
                raise
            raise UserError(f"{server.url}: does not support weight updates ({e}); start the server as in "
                            "docs/rl.md, or leave --engine-url out") from None
        member.version = weights.version

    def _dispatch_tasks(self) -> None:
        """Assign waiting tasks to servers with free capacity; the caller holds the lock."""
        while self._waiting and not (self._is_paused or self._is_over or self._failure):
            task = self._waiting[0]
            free = [member for member in self._members if member.can_accept(task, self.requests)]
            if not free:
                return
            member = min(free, key=lambda member: member.num_answers)
            self._waiting.popleft()
            if not task.future.running():  # tasks of a dead server are already running
                task.future.set_running_or_notify_cancel()
            member.under_way[task.request.name] = task
            self._assigned.put((member, task))
            # a thread per request in progress
            if self._num_idle:
                self._num_idle -= 1
            else:
                self._start_thread(self._run_tasks)

    def _run_tasks(self) -> None:
        while (assigned := self._assigned.get()) is not None:
            self._run_task(*assigned)

    def _run_task(self, member: _Member, task: _Task) -> None:
        server = member.server
        try:
            if server is None:
                raise BadAnswer("the server is down", is_unavailable=True)
            answers = server.write(task.request)
        except RequestRefused as e:
            self._finish_task(member, task, UserError(f"the engine refuses a request: {e}"))
        except (BadAnswer, TimeoutError) as e:
            self._requeue_task(member, task, e)
        else:
            member.num_starts = 0
            self._finish_task(member, task, answers)

    def _finish_task(self, member: _Member, task: _Task, answers: list[TokenAnswer] | Exception) -> None:
        with self._changed:
            member.under_way.pop(task.request.name, None)
            self._num_idle += 1
            self._dispatch_tasks()
        _set_result(task, answers)

    def _requeue_task(self, member: _Member, task: _Task, why: Exception) -> None:
        task.attempts += 1
        with self._changed:
            member.under_way.pop(task.request.name, None)
            should_retry = not (self._is_over or task.is_aborted or task.attempts >= ATTEMPTS
                                or self._failure is not None)
            member.num_resting += 1
            if should_retry:
                # at the head of the queue: the task has waited longest
                self._waiting.appendleft(task)
                self._dispatch_tasks()
        if not should_retry:
            _set_result(task, _empty_answers(task) if task.is_aborted else self._build_error(why))
        # delay, because a server that refuses at once would drain the queue
        time.sleep(self._look_s)
        with self._changed:
            member.num_resting -= 1
            self._num_idle += 1
            self._dispatch_tasks()

    def _build_error(self, why: Exception) -> BaseException:
        """Return the error for a task whose attempts are used up."""
        if self._is_over:
            return RuntimeError(ENDED)
        return self._failure or UserError(f"{ATTEMPTS} attempts of one request have failed; the last error: "
                                          f"{why}")


@dataclass(frozen=True)
class WeightUpdate:
    """Weight files for the servers, with their version."""

    files: tuple[str, ...]
    version: int


class ServerKeeper(Protocol):
    """Starts and stops one server."""

    def start(self, should_stop: Callable[[], bool]) -> VllmServer | None:
        """Start the server and return it once healthy; None if `should_stop` returned True. Raises
        `UserError`: the server does not start."""

    def is_alive(self) -> bool:
        """Return whether the server process runs, as far as known."""

    def end(self) -> None:
        ...


class AddressKeeper:
    """Waits for a server that the user has started at an address.

    Args:
        server: the server.
        wait_s: time to wait for its first answer.
    """

    def __init__(self, server: VllmServer, wait_s: float) -> None:
        self._server, self._wait_s = server, wait_s

    def start(self, should_stop: Callable[[], bool]) -> VllmServer | None:
        """Wait until the server answers, see `ServerKeeper`."""
        ends_s = time.monotonic() + self._wait_s
        is_waiting = False
        while not self._server.is_healthy():
            if not is_waiting:
                warn(f"--engine-url {self._server.url}: does not answer; waiting up to {self._wait_s:g} s "
                     "for it (--engine-set start_s)")
                is_waiting = True
            if should_stop():
                return None
            if time.monotonic() >= ends_s:
                raise UserError(f"--engine-url {self._server.url}: has not answered for {self._wait_s:g} s; "
                                "check that the server runs, then repeat the command")
            time.sleep(LOOK_S)
        return self._server

    def is_alive(self) -> bool:
        """Return whether the port accepts connections; a restarted server has lost its weights."""
        address = urllib.parse.urlsplit(self._server.url)
        try:
            socket.create_connection((address.hostname, address.port or 80), LOOK_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:  # a slow network does not prove that the server has ended
            return True
        return True

    def end(self) -> None:
        """Do nothing: other jobs may use the server."""


@dataclass
class _Task:
    request: TokenRequest
    future: Future[list[TokenAnswer]]
    attempts: int = 0
    is_aborted: bool = False


class _Member:
    """A fleet server and the tasks assigned to it."""

    def __init__(self, number: int, keeper: ServerKeeper) -> None:
        self.number, self.keeper = number, keeper
        self.server: VllmServer | None = None
        """None while the server is down."""
        self.version: int | None = None
        """Version from the last update; None: the weights loaded at the start."""
        self.under_way: dict[str, _Task] = {}
        self.num_starts = 0
        """Starts since the last answer."""
        self.num_resting = 0
        """Recently refused requests; while above 0, the server gets no further request."""
        self.changing = threading.Lock()
        """Held during weight updates and starts."""

    @property
    def num_answers(self) -> int:
        """Answers in progress."""
        return sum(task.request.num_answers for task in self.under_way.values())

    def can_accept(self, task: _Task, answers: int) -> bool:
        """Return whether the server has capacity for a task; `answers` is its limit of answers at a time."""
        return (self.server is not None and not self.num_resting
                and (not self.under_way or self.num_answers + task.request.num_answers <= answers))


def _empty_answers(task: _Task) -> list[TokenAnswer]:
    """Return empty answers for a task aborted before the start."""
    return [TokenAnswer([], [], ABORTED)] * task.request.num_answers


def _set_result(task: _Task, answers: list[TokenAnswer] | BaseException) -> None:
    """Set a task's result, unless the future is already done."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(answers, BaseException):
            task.future.set_exception(answers)
        else:
            task.future.set_result(answers)
