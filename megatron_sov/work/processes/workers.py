"""Processes that answer requests: limited in time, replaced where they end, several at a time.

They are forks of a small server that has imported what they need and nothing else: one that was ended is
replaced in a moment, and no thread of a caller's library is ever forked.
"""

from __future__ import annotations

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
from megatron_sov.work.processes.channel import receive, send
from megatron_sov.work.processes.children import Child, be_killed_with_parent
from megatron_sov.work.processes.watch import OwnTime, Watch

LOOK_EVERY_S = 0.25
"""At what a process takes that has not answered yet."""
START_LIMIT_S = 120.0
"""For a process to import and make what it answers with."""
END_LIMIT_S = 60.0
"""For the kernel to say how a process has ended."""
QUICK_S, MOST_AT_ONCE = 0.01, 64
"""Requests that take no longer go to a process by so many: a message and its answer, one after the other,
take longer than the work itself."""
_PRELOADED: dict[str, None] = {}
"""Modules of all such processes, in order: they share one server."""
Key = TypeVar("Key")
Answer = Callable[[Any, Callable[[], None]], Any]
"""What a process does: it is given a request, and a function to call where its time begins anew, and returns
the answer; both are JSON."""


class _Fork(Child):
    """One such process."""

    def __init__(self, make: Callable[..., Answer], arguments: tuple[object, ...],
                 may_start_processes: bool) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # forked by a server without threads: a fork of this process could inherit a held lock
            process = multiprocessing.get_context("forkserver").Process(
                target=_begin, args=(theirs, make, arguments), daemon=not may_start_processes)
            process.start()

        def wait(within_s: float | None) -> int | None:
            process.join(within_s)
            return process.exitcode

        super().__init__(ours, process.kill, wait)
        ours.settimeout(START_LIMIT_S)  # for the rest of a message that has begun
        assert process.pid is not None
        self._watch = Watch(process.pid)
        self._time = OwnTime(self._watch.totals, LOOK_EVERY_S)
        """Of its work, without what it waits for a processor."""
        self.limit_s = START_LIMIT_S
        self.is_ready = False
        self.given: deque[tuple[Any, Any]] = deque()
        """(key, request): the one that it works on, and those behind it."""
        self.most = 1
        """Requests that it is given together."""
        self._num_given, self._given_s = 0, 0.0

    @property
    def look_at_s(self) -> float:
        return self._time.look_at_s

    def begin_again(self) -> None:
        self._time.begin_again()

    def give(self, asked: Sequence[tuple[Any, Any]], limit_s: float) -> None:
        """Give it requests, to be answered one after the other, each within so many seconds."""
        self.given.extend(asked)
        self.limit_s, self._num_given, self._given_s = limit_s, len(asked), time.monotonic()
        self.begin_again()
        with contextlib.suppress(OSError):  # it has just ended, which is found out next
            send(self.channel, [request for _, request in asked])

    def take_answered(self) -> Any:
        """Return the key of the request that it has answered."""
        key, _ = self.given.popleft()
        if self.given:
            # without a look at what it takes: what it took for the answers before is little
            self._time.begin()
        else:
            is_quick = time.monotonic() - self._given_s <= QUICK_S * self._num_given
            self.most = min(2 * self.most, MOST_AT_ONCE) if is_quick else 1
        return key

    def is_late(self) -> bool:
        """Return whether it has taken its time without an answer."""
        now_s = time.monotonic()
        if now_s >= self._time.look_at_s:
            self._time.look(now_s)
        # one that has answered meanwhile is not late
        return self._time.own_s(now_s) >= self.limit_s and not connection.wait([self.channel], 0)

    def end(self) -> None:
        super().end()
        self._watch.close()


@dataclass(frozen=True)
class Lost:
    """What becomes of a request whose process gave no answer; it has been ended."""

    exit_code: int | None
    """How it had ended by itself; None: its time had run out."""


class Workers:
    """Processes that each answer one request after the other, and are replaced where they end; a context.

    They end with this process, as all that is below them unless they may start processes of their own.
    """

    def __init__(self, name: str, make: Callable[..., Answer], arguments: tuple[object, ...], *,
                 num: int = 1, modules: Iterable[str] = (), most_bytes: int | None = None,
                 may_start_processes: bool = False) -> None:
        """Start nothing yet.

        Args:
            name: what they are processes of, for messages.
            make: a function of a module, called in each process with `arguments`; a `UserError` of it, or of
                an answer, ends the work.
            arguments: plain values.
            num: processes.
            modules: that they need; imported once for all.
            most_bytes: of an answer; None: any.
            may_start_processes: False: of those that this process forgets to end, none outlives it.
        """
        self._name, self._make, self._arguments, self._num = name, make, arguments, num
        self._most_bytes, self._may_start_processes = most_bytes, may_start_processes
        self._workers: list[_Fork] = []
        # one server for all: modules are added before it starts, later ones are imported by each fork
        _PRELOADED.update(dict.fromkeys([__name__, make.__module__, *modules]))
        multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOADED])

    def answers(self, waiting: deque[tuple[Key, Any]], limit_s: float) -> Iterator[tuple[Key, Any]]:
        """Yield (key, answer) as they come, where an answer may be `Lost`.

        Args:
            waiting: (key, request); the caller may add more until all are answered.
            limit_s: for an answer, without the time that the process waits for a processor.

        Raises:
            UserError: as `make` and what it returns do; or a process cannot be started.
        """
        try:
            while waiting or any(worker.given for worker in self._workers):
                self._hand_out(waiting, limit_s)
                busy = [worker for worker in self._workers if worker.given or not worker.is_ready]
                # sleep until a message comes or a process has to be looked at
                left_s = min(worker.look_at_s for worker in busy) - time.monotonic()
                came = connection.wait([worker.channel for worker in busy], max(left_s, 0.0))
                for worker in busy:
                    if worker.channel in came or worker.is_late():
                        for answer in self._taken(worker, worker.channel in came):
                            key = worker.take_answered()
                            if isinstance(answer, Lost):  # those behind it are not to blame
                                waiting.extendleft(reversed(worker.given))
                            yield key, answer
        finally:
            # one with a request under way would send its answer to the next caller
            for worker in [worker for worker in self._workers if worker.given]:
                self._end(worker)

    def _hand_out(self, waiting: deque[tuple[Key, Any]], limit_s: float) -> None:
        wanted = len(waiting) + sum(bool(worker.given) for worker in self._workers)
        while len(self._workers) < min(self._num, wanted):
            self._workers.append(_Fork(self._make, self._arguments, self._may_start_processes))
        for worker in self._workers:
            if waiting and worker.is_ready and not worker.given:
                count = min(worker.most, -(-len(waiting) // self._num))
                worker.give([waiting.popleft() for _ in range(count)], limit_s)

    def _taken(self, worker: _Fork, has_sent: bool) -> list[Any]:
        """Return the answer of a worker that has sent something, or is late; none where it goes on."""
        code: int | None = None
        try:
            if has_sent:
                kind, value = receive(worker.channel, self._most_bytes)
                if kind == "answer":
                    return [value]
                if kind == "problem":
                    self._end(worker)
                    raise UserError(value)
                # "ready" or "again": its time begins from now
                worker.is_ready = True
                worker.begin_again()
                return []
        except TimeoutError:
            pass
        except (EOFError, OSError):
            code = worker.exit_code(END_LIMIT_S) or 0
        except (ValueError, TypeError):  # no answer, or one that is too long
            code = -signal.SIGKILL
        self._end(worker)
        if worker.is_ready:
            return [Lost(code)]
        if code is None:
            raise UserError(f"a process of {self._name} has not started within {START_LIMIT_S:g} s; "
                            "give the machine less to do, or look at what it does when it is made")
        raise UserError(f"a process of {self._name} ended while it started (exit code {code}); see what it "
                        "wrote above")

    def _end(self, worker: _Fork) -> None:
        self._workers.remove(worker)
        worker.end()

    def end(self) -> None:
        for worker in [*self._workers]:
            self._end(worker)


def _begin(channel: socket.socket, make: Callable[..., Answer], arguments: tuple[object, ...]) -> None:
    """Answer as long as the server lives, which ends with the command; Ctrl-C is left to the command, which
    ends its processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    be_killed_with_parent()
    # The server ends when nobody holds this pipe's end any more: held here too, it and a process that is at
    # work would go on behind a command that was killed.
    shared: Any = forkserver._forkserver
    if shared._forkserver_alive_fd is not None:
        os.close(shared._forkserver_alive_fd)
        shared._forkserver_alive_fd = None
    serve(channel, make, arguments)


def serve(channel: socket.socket, make: Callable[..., Answer], arguments: tuple[object, ...]) -> None:
    """Answer requests until the other side has gone, perhaps before it read all."""
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            answer = make(*arguments)
            send(channel, ("ready", ""))
            while True:
                for request in receive(channel):
                    # each by itself: where a process ends, the first without an answer has ended it
                    send(channel, ("answer", answer(request, lambda: send(channel, ("again", "")))))
        except UserError as e:
            send(channel, ("problem", str(e)))
