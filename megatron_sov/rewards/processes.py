"""Rewards in processes of their own, each row with a limit of time and memory: one that hangs, or a response
that makes a verifier eat the machine, costs its row and nothing else.

Whose fault it is follows from what was used. A judge that has used its time of a processor, its memory or its
stack, where the same row with an ordinary response takes nothing of the kind, was kept busy by the response:
that is worth 0, else a policy could escape a bad grade. A judge that the clock has run out on waits for
something: its row is judged once more, and has no reward then. What it waits for a processor does not count.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any, Self

from megatron_sov.errors import UserError
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.registry import build
from megatron_sov.rewards.reward import Result, Row, agreeing, judged
from megatron_sov.work.children import Fork, limit_memory, preload
from megatron_sov.work.environment import forget_other_variables

TIME_LIMIT_S = 30.0
"""Per row, where a reward has no setting `time_limit_s`."""
START_LIMIT_S = 120.0
"""For a process to import and make its reward."""
MAX_MEMORY_BYTES = 4 << 30
"""Of address space per process, where a reward has no `MAX_MEMORY_BYTES`."""
CHECKED_TWICE, EVERY = 32, 32
"""The first rows, and one of so many behind them, are judged twice: a reward must not change by itself."""
FAULTS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE,
                    signal.SIGILL))
"""Signals that end a process for what it does itself: its time of a processor is over, its stack, ..."""
AGAIN = None
"""What a process sends between the two times that it judges a row: each has the whole time."""


class ProcessRunner:
    """A reward in `workers` processes; a context, since processes have to end.

    Args:
        asked: which reward.
        time_limit_s: for a row.
        workers: processes.
        modules: what the reward needs and can be found by name; imported once for all processes.
        variables: of the environment that it needs, beside those of `environment.KEPT`.
        cpu_limit_s: of a processor, for a row; infinite: the clock alone counts.
        control: a response that takes nothing to judge: where a row passes a limit with its own response and
            not with this one, its response is worth 0; None: rows that pass a limit have no reward.
    """

    def __init__(self, asked: Order, time_limit_s: float, workers: int, modules: Sequence[str] = (),
                 variables: Sequence[str] = (), *, cpu_limit_s: float = math.inf,
                 control: str | None = None) -> None:
        self._asked, self._time_limit_s, self._variables = asked, time_limit_s, tuple(variables)
        self._cpu_limit_s, self._control = cpu_limit_s, control
        preload([__name__, *modules])
        self._slots: list[_Slot] = []
        self._workers, self._num_seen = workers, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for slot in self._slots:
            slot.fork.end()
        self._slots.clear()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of rows, in their order.

        Raises:
            UserError: processes of this reward cannot be started.
        """
        results: dict[int, Result] = {}
        suspects: dict[int, Result] = {}
        late: set[int] = set()
        waiting = deque(range(len(rows)))
        while len(self._slots) < min(self._workers, len(rows)):
            self._slots.append(self._start())
        while len(results) < len(rows):
            for slot in self._slots:
                if slot.ready and slot.index is None and waiting:
                    place = waiting.popleft()
                    self._give(slot, place, rows[place], is_control=place in suspects)
            self._wait()
            for i, slot in enumerate(self._slots):
                result, index = slot.take(), slot.index
                if result is not None and index is not None:
                    slot.index = None
                    if index in suspects:
                        results[index] = _blamed(suspects[index], result)
                    elif result.spent and self._control is not None:
                        suspects[index] = result
                        waiting.append(index)
                    elif slot.late and self._control is not None and index not in late:
                        late.add(index)
                        waiting.append(index)
                    else:
                        results[index] = result
                if slot.gone:
                    slot.fork.end()
                    self._slots[i] = self._start()
        self._num_seen += len(rows)
        return [results[i] for i in range(len(rows))]

    def _start(self) -> _Slot:
        fork = Fork(_work, (self._asked, self._variables, self._cpu_limit_s))
        return _Slot(fork, self._cpu_limit_s)

    def _give(self, slot: _Slot, index: int, row: Row, is_control: bool) -> None:
        place = self._num_seen + index
        twice = not is_control and (place < CHECKED_TWICE or place % EVERY == 0)
        slot.index, slot.limit_s = index, self._time_limit_s
        slot.fork.time.begin_again()
        with contextlib.suppress(OSError):  # it has just ended, which `take` finds out
            slot.fork.pipe.send(({**row, "response": self._control} if is_control else dict(row), twice))

    def _wait(self) -> None:
        """Wait until a process has answered or ended, or is to be looked at."""
        busy = [slot for slot in self._slots if slot.index is not None or not slot.ready]
        left_s = min((slot.fork.time.look_at_s for slot in busy), default=0.0) - time.monotonic()
        connection.wait([slot.fork.pipe for slot in busy], timeout=max(left_s, 0.0))


class _Slot:
    """A process and what it works on."""

    def __init__(self, fork: Fork, cpu_limit_s: float) -> None:
        self.fork, self._cpu_limit_s = fork, cpu_limit_s
        self.index: int | None = None
        self.limit_s = START_LIMIT_S
        self.ready = self.gone = self.late = False

    def take(self) -> Result | None:
        """Return the result of the row that it was given, where there is one now."""
        if self.index is None and self.ready:
            return None
        try:
            if self.fork.pipe.poll():
                message = self.fork.pipe.recv()
                if not self.ready:
                    self._begin(message)
                elif isinstance(message, UserError):
                    raise message
                elif message is AGAIN:
                    self.fork.time.begin_again()
                else:
                    return message
                return None
        except (EOFError, OSError):
            self.gone, code = True, self.fork.exit_code()
            if not self.ready:
                raise UserError(f"a process of the reward ended while it started (exit code {code}); see "
                                "what it wrote above") from None
            return _ended(code or 0, self._cpu_limit_s)
        if not self.fork.is_late(self.limit_s):
            return None
        self.gone = self.late = True
        if not self.ready:
            raise UserError(f"a process of the reward has not started within {START_LIMIT_S:g} s; "
                            "give the machine less to do, or look at what the reward does when it is made")
        return Result(None, "timeout", {}, f"took longer than {self.limit_s:g} s")

    def _begin(self, problem: str) -> None:
        if problem:
            raise UserError(problem)
        self.ready = True


def _ended(exit_code: int, cpu_limit_s: float) -> Result:
    """Return the result of a row whose process has ended."""
    if exit_code == -signal.SIGPROF:
        return Result(None, "timeout", {}, f"judging took longer than {cpu_limit_s:g} s of a processor",
                      spent=True)
    return Result(None, "failed", {}, f"the process that judged it ended (exit code {exit_code})",
                  spent=-exit_code in FAULTS)


def _blamed(suspect: Result, control: Result) -> Result:
    """Return the result of a row that passed a limit, from the one that it has with an ordinary response."""
    if control.reward is None:
        return suspect
    reason = f"the response: {suspect.reason}"
    return Result(0.0, "timeout" if suspect.status == "timeout" else "scored", {"why": reason}, reason)


def _work(pipe: connection.Connection, asked: Order, variables: Sequence[str], cpu_limit_s: float) -> None:
    """Make the reward, then judge what comes until the pipe is closed."""
    forget_other_variables(variables)
    try:
        reward = build(asked)
        if hasattr(reward, "prepare"):
            reward.prepare()
    except UserError as e:
        pipe.send(str(e))
        return
    limit_memory(getattr(reward, "MAX_MEMORY_BYTES", MAX_MEMORY_BYTES))
    with contextlib.suppress(EOFError, ConnectionError):  # the command has ended, perhaps before it read all
        pipe.send("")
        _judge_all(pipe, reward, cpu_limit_s)


def _judge_all(pipe: connection.Connection, reward: Any, cpu_limit_s: float) -> None:
    """Judge what comes until the pipe is closed, which its errors say."""
    while True:
        row, twice = pipe.recv()
        try:
            result = _judged_in(cpu_limit_s, reward, row)
            if twice and result.reward is not None:
                pipe.send(AGAIN)
                result = agreeing(result, _judged_in(cpu_limit_s, reward, row))
        except UserError as e:  # it would meet every row
            pipe.send(UserError(str(e)))
            return
        pipe.send(result)


def _judged_in(cpu_limit_s: float, reward: Any, row: Row) -> Result:
    """Return what a reward makes of a row; where it takes longer, the kernel ends this process, whatever
    that is doing."""
    if not math.isfinite(cpu_limit_s):
        return judged(reward, row)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        return judged(reward, row)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
