"""Engine servers that share one queue of requests.

A request is given to whoever has most room for its answers.  A server that dies loses what it had under way,
which goes back to the head of the queue; it is started again, has the newest weights, and takes part anew.
Weights change on all of them while what is under way stands still.
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
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest, TokenServer

LOOK_S = 1.0
"""Between two looks at a server."""
SILENT_S = 60.0
"""Without a sign of life after which a server counts as dead."""
BACKOFF_S = (1.0, 60.0)
"""Before a server is started again: twice as long each time, within these bounds."""
ENDED = "the engine servers have been ended"
ATTEMPTS = 8
"""At one request, by whichever server."""


class Keeper(Protocol):
    """Who can bring a server (back) to life."""

    def start(self, should_stop: Callable[[], bool]) -> TokenServer | None:
        """Return the server when it answers; None: it was asked to stop.

        Raises:
            UserError: it does not come.
        """
        ...

    def is_alive(self) -> bool:
        """Return whether its process runs, as far as can be known."""
        ...

    def end(self) -> None:
        ...


class AddressKeeper:
    """A server that somebody else has started."""

    def __init__(self, server: TokenServer, wait_s: float) -> None:
        """Take the server, and how long it is waited for."""
        self._server, self._wait_s = server, wait_s

    def start(self, should_stop: Callable[[], bool]) -> TokenServer | None:
        """Wait until it answers, see `Keeper`."""
        ends_s = time.monotonic() + self._wait_s
        is_told = False
        while not self._server.is_healthy():
            if not is_told:
                warn(f"--engine-url {self._server.url}: does not answer; waiting up to {self._wait_s:g} s "
                     "for it (--engine-set start_s)")
                is_told = True
            if should_stop():
                return None
            if time.monotonic() >= ends_s:
                raise UserError(f"--engine-url {self._server.url}: has not answered for {self._wait_s:g} s; "
                                "see whether the server runs there, and give the same command again")
            time.sleep(LOOK_S)
        return self._server

    def is_alive(self) -> bool:
        """Return whether something listens there: who starts a server again does not say so, and it has lost
        its weights."""
        where = urllib.parse.urlsplit(self._server.url)
        try:
            socket.create_connection((where.hostname, where.port or 80), LOOK_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:  # a network that is slow is no server that has ended
            return True
        return True

    def end(self) -> None:
        """Leave it as it is: others may ask it too."""


@dataclass(frozen=True)
class HeldFiles:
    """Weights that servers are to have."""

    files: tuple[str, ...]
    version: int


@dataclass
class _Task:
    request: TokenRequest
    future: Future[list[TokenAnswer]]
    attempts: int = 0
    is_aborted: bool = False


class _Member:
    """A server and its place in the fleet."""

    def __init__(self, number: int, keeper: Keeper) -> None:
        self.number, self.keeper = number, keeper
        self.server: TokenServer | None = None
        """None: it is not there."""
        self.version: int | None = None
        """Of the weights that it was given; None: it has those of its start."""
        self.under_way: dict[str, _Task] = {}
        self.num_starts = 0
        """Since its last answer."""
        self.num_resting = 0
        """Requests that it has just refused: it is given nothing more for a moment."""
        self.changing = threading.Lock()
        """Held while weights are changed, or the server is started."""

    @property
    def num_asked(self) -> int:
        """Answers under way."""
        return sum(task.request.num_answers for task in self.under_way.values())

    def takes(self, task: _Task, answers: int) -> bool:
        """Return whether a task can be given to it, where it writes so many answers at a time."""
        return (self.server is not None and not self.num_resting
                and (not self.under_way or self.num_asked + task.request.num_answers <= answers))


class Fleet:
    """Servers at work; entered as a context, which ends them."""

    def __init__(self, keepers: Sequence[Keeper], vocab_size: int, requests: int, restarts: int = 5, *,
                 over: threading.Event | None = None, look_s: float = LOOK_S,
                 backoff_s: tuple[float, float] = BACKOFF_S) -> None:
        """Start nothing yet.

        Args:
            keepers: of the servers, at least one.
            vocab_size: what token ids must lie below: a server may die of a greater one.
            requests: that a server is given at a time, counted by their answers.
            restarts: starts of a server without an answer in between, before all ends.
            over: ends the fleet when it is set, also while it waits for its first server.
            look_s: between two looks at a server.
            backoff_s: before a server is started again, at least and at most.
        """
        self._members = [_Member(number, keeper) for number, keeper in enumerate(keepers)]
        self.requests, self._vocab_size, self._restarts = requests, vocab_size, restarts
        self._look_s, self._backoff_s = look_s, backoff_s
        self._waiting: deque[_Task] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._given: SimpleQueue[tuple[_Member, _Task] | None] = SimpleQueue()
        self._num_idle = 0
        """Threads that wait for what is given, without those that something lies there for."""
        self._held: HeldFiles | None = None
        self._over, self._is_paused = over or threading.Event(), False
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Fleet:
        for member in self._members:
            self._begin(partial(self._watch, member))
        try:
            # one is enough to begin with; the others join when they are there
            self._wait_for(lambda: any(member.server is not None for member in self._members))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers that are ours, and everything that is under way."""
        with self._changed:
            self._over.set()
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in left:
            _settle(task, RuntimeError(ENDED))
        for _ in self._threads:
            self._given.put(None)
        with ThreadPoolExecutor(len(self._members)) as pool:
            list(pool.map(lambda member: member.keeper.end(), self._members))
        # threads whose server is somebody else's end with their answer, and hold nothing up
        for thread in self._threads:
            thread.join(timeout=self._look_s)

    @property
    def num_servers(self) -> int:
        return len(self._members)

    @property
    def _is_over(self) -> bool:
        return self._over.is_set()

    def submit(self, request: TokenRequest) -> Future[list[TokenAnswer]]:
        """Return what will be the answers; it is running from when a server takes the request.

        Raises:
            UserError: the ids are not the model's, or no server can be brought to life any more.
        """
        if not all(ids and min(ids) >= 0 and max(ids) < self._vocab_size for ids in request.prompts):
            raise UserError(f"request {request.name}: has no token ids, or some that are not below the "
                            f"model's vocab_size = {self._vocab_size}; a server would end with them for "
                            "everybody")
        task = _Task(request, Future())
        with self._changed:
            self._check()
            self._waiting.append(task)
            self._give()
        return task.future

    def abort(self, names: Sequence[str]) -> None:
        """End requests: their answers come with what they have, which may be nothing."""
        wanted = set(names)
        with self._changed:
            ended = [task for task in self._waiting if task.request.name in wanted]
            for task in ended:
                self._waiting.remove(task)
            running = {member: [task for name, task in member.under_way.items() if name in wanted]
                       for member in self._members}
            for own in running.values():
                for task in own:
                    task.is_aborted = True
        for task in ended:
            _settle(task, _nothing(task))
        for member, own in running.items():
            if own and (server := member.server) is not None:
                try:
                    server.abort([task.request for task in own])
                except (BadAnswer, TimeoutError) as e:
                    # its answers come in full, or it is found dead and they come from nobody
                    warn(f"{server.url}: does not abort ({e})")

    def update(self, files: Sequence[str], version: int) -> None:
        """Give all servers other weights; what is under way goes on with them.

        Args:
            files: safetensors that stay until the next update: a server that is started again reads them.
            version: of theirs.

        Raises:
            UserError: no server is left that has them.
        """
        with self._changed:
            self._held, self._is_paused = HeldFiles(tuple(files), version), True
        try:
            with ThreadPoolExecutor(len(self._members)) as pool:
                list(pool.map(self._bring_up, self._members))
        finally:
            with self._changed:
                self._is_paused = False
                self._give()
        self._wait_for(lambda: any(m.server is not None and m.version == version for m in self._members))

    def score(self, ids: Sequence[int]) -> list[list[float]]:
        """Return what each server that is there says of the tokens of a text; whether one that does not
        answer lives, others find out."""
        found = []
        for server in [member.server for member in self._members if member.server is not None]:
            try:
                found.append(server.score(ids))
            except (BadAnswer, TimeoutError) as e:
                warn(f"{server.url}: says nothing of a known text ({e})")
        return found

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            # what a thread ends with, whoever asks hears
            self._fail(e)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            left = [*self._waiting, *(task for member in self._members for task in member.under_way.values())]
            self._waiting.clear()
            self._changed.notify_all()
        for task in left:
            _settle(task, self._failure)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_over:
            raise RuntimeError(ENDED)

    def _wait_for(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            while not holds():
                self._check()
                self._changed.wait(self._look_s)

    def _watch(self, member: _Member) -> None:
        """Keep a server alive, for as long as the fleet lives."""
        seen_s = time.monotonic()
        while not self._is_over:
            if member.server is None:
                self._start(member)
                seen_s = time.monotonic()
            elif not member.keeper.is_alive():
                self._lose(member, "its process has ended")
            elif member.server.is_healthy():
                seen_s = time.monotonic()
            elif time.monotonic() - seen_s > SILENT_S:
                self._lose(member, f"it has not answered for {SILENT_S:g} s")
            with self._changed:
                if not self._is_over and member.server is not None:
                    self._changed.wait(self._look_s)

    def _start(self, member: _Member) -> None:
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
                self._give_weights(member, server)
            except (BadAnswer, TimeoutError) as e:
                warn(f"{server.url}: did not take the weights ({e}); it is started again")
                return
            with self._changed:
                member.server = server
                self._changed.notify_all()
                self._give()

    def _lose(self, member: _Member, why: str) -> None:
        """Take a server for dead, and what it had under way back."""
        with self._changed:
            server, member.server = member.server, None
        if server is not None:
            warn(f"{server.url}: {why}; what it had under way is written elsewhere, and it is started again")

    def _bring_up(self, member: _Member) -> None:
        with member.changing:
            if (server := member.server) is None:
                return
            try:
                self._give_weights(member, server)
            except (BadAnswer, TimeoutError) as e:
                self._lose(member, f"did not take the weights ({e})")

    def _give_weights(self, member: _Member, server: TokenServer) -> None:
        held = self._held
        if held is None or member.version == held.version:
            return
        try:
            server.pause()
            server.update(held.files, held.version)
            server.resume()
        except RequestRefused as e:
            if "HTTP 404" not in str(e):  # where it has the routes, it may take them after another start
                raise
            raise UserError(f"{server.url}: takes no other weights ({e}); name a server that was started as "
                            "docs/rl.md says, or none") from None
        member.version = held.version

    def _give(self) -> None:
        """Give what waits to the servers that have room for it; the lock is held."""
        while self._waiting and not (self._is_paused or self._is_over or self._failure):
            task = self._waiting[0]
            free = [member for member in self._members if member.takes(task, self.requests)]
            if not free:
                return
            member = min(free, key=lambda member: member.num_asked)
            self._waiting.popleft()
            if not task.future.running():  # what a server has lost is begun already
                task.future.set_running_or_notify_cancel()
            member.under_way[task.request.name] = task
            self._given.put((member, task))
            # as many threads as requests were ever under way: each waits for one answer
            if self._num_idle:
                self._num_idle -= 1
            else:
                self._begin(self._serve)

    def _serve(self) -> None:
        """Ask one thing after the other, of whichever server it is given to."""
        while (given := self._given.get()) is not None:
            self._ask(*given)

    def _ask(self, member: _Member, task: _Task) -> None:
        server = member.server
        try:
            if server is None:
                raise BadAnswer("it is gone", is_unavailable=True)
            answers = server.write(task.request)
        except RequestRefused as e:
            self._answer(member, task, UserError(f"the engine refuses a request: {e}"))
        except (BadAnswer, TimeoutError) as e:
            self._take_back(member, task, e)
        else:
            member.num_starts = 0
            self._answer(member, task, answers)

    def _answer(self, member: _Member, task: _Task, answers: list[TokenAnswer] | Exception) -> None:
        with self._changed:
            member.under_way.pop(task.request.name, None)
            self._num_idle += 1
            self._give()
        _settle(task, answers)

    def _take_back(self, member: _Member, task: _Task, why: Exception) -> None:
        task.attempts += 1
        with self._changed:
            member.under_way.pop(task.request.name, None)
            is_wanted = not (self._is_over or task.is_aborted or task.attempts >= ATTEMPTS
                             or self._failure is not None)
            member.num_resting += 1
            if is_wanted:
                # others have waited less long than this one
                self._waiting.appendleft(task)
                self._give()
        if not is_wanted:
            _settle(task, _nothing(task) if task.is_aborted else self._why_not(why))
        # a server that refuses at once must not empty the queue against itself
        time.sleep(self._look_s)
        with self._changed:
            member.num_resting -= 1
            self._num_idle += 1
            self._give()

    def _why_not(self, why: Exception) -> BaseException:
        """Return why a request is given up, after its last attempt."""
        if self._is_over:
            return RuntimeError(ENDED)
        return self._failure or UserError(f"{ATTEMPTS} attempts at one request have failed; the last one: "
                                          f"{why}")


def _nothing(task: _Task) -> list[TokenAnswer]:
    """Return the answers of a task that was aborted before it had any."""
    return [TokenAnswer([], [], ABORTED)] * task.request.num_answers


def _settle(task: _Task, answers: list[TokenAnswer] | BaseException) -> None:
    """Give a task its answers, the first ones."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(answers, BaseException):
            task.future.set_exception(answers)
        else:
            task.future.set_result(answers)
