"""Rewards in processes of their own, each row with a limit of time and memory: one that hangs, or a response
that makes a verifier eat the machine, costs its row and nothing else.

Whose fault it is follows from what was used. A judge that has used its time of a processor, its memory or its
stack, where the same row with an ordinary response takes nothing of the kind, was kept busy by the response:
that is worth 0, else a policy could escape a bad grade. A judge that the clock has run out on waits for
something: its row is judged once more, and has no reward then. What it waits for a processor does not count.

The processes are forks of a small server that has imported the rewards and nothing else, so that one that was
ended is replaced in a moment, and no thread of a caller's library is ever forked.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from megatron_sov.errors import UserError
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.environment import forget_other_variables
from megatron_sov.rewards.forks import end_with_command, limit_memory
from megatron_sov.rewards.registry import build
from megatron_sov.rewards.reward import Result, Row, agreeing, judged
from megatron_sov.rewards.sandbox.watch import OwnTime, Watch

TIME_LIMIT_S = 30.0
"""Per row, where a reward has no setting `time_limit_s`."""
START_LIMIT_S = 120.0
"""For a process to import and make its reward."""
LOOK_EVERY_S = 0.25
"""At what a process that judges takes."""
MAX_MEMORY_BYTES = 4 << 30
"""Of address space per process, where a reward has no `MAX_MEMORY_BYTES`."""
CHECKED_TWICE, EVERY = 32, 32
"""The first rows, and one of so many behind them, are judged twice: a reward must not change by itself."""
FAULTS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE,
                    signal.SIGILL))
"""Signals that end a process for what it does itself: its time of a processor is over, its stack, ..."""
AGAIN = None
"""What a process sends between the two times that it judges a row: each has the whole time."""
_PRELOADED: dict[str, None] = {}
"""Modules of all runners, in order: they share one server."""


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
        self._context = multiprocessing.get_context("forkserver")
        _PRELOADED.update(dict.fromkeys(modules))
        self._context.set_forkserver_preload([__name__, *_PRELOADED])
        self._slots: list[_Slot] = []
        self._workers, self._num_seen = workers, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for slot in self._slots:
            slot.end()
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
                    slot.end()
                    self._slots[i] = self._start()
        self._num_seen += len(rows)
        return [results[i] for i in range(len(rows))]

    def _start(self) -> _Slot:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, daemon=True, args=(
            there, self._asked, self._variables, self._cpu_limit_s))
        process.start()
        there.close()
        return _Slot(process, here, self._cpu_limit_s)

    def _give(self, slot: _Slot, index: int, row: Row, is_control: bool) -> None:
        place = self._num_seen + index
        twice = not is_control and (place < CHECKED_TWICE or place % EVERY == 0)
        slot.index, slot.limit_s = index, self._time_limit_s
        slot.time.begin_again()
        with contextlib.suppress(OSError):  # it has just ended, which `take` finds out
            slot.pipe.send(({**row, "response": self._control} if is_control else dict(row), twice))

    def _wait(self) -> None:
        """Wait until a process has answered or ended, or is to be looked at."""
        busy = [slot for slot in self._slots if slot.index is not None or not slot.ready]
        left_s = min((slot.time.look_at_s for slot in busy), default=0.0) - time.monotonic()
        connection.wait([slot.pipe for slot in busy], timeout=max(left_s, 0.0))


class _Slot:
    """A process and what it works on."""

    def __init__(self, process: BaseProcess, pipe: connection.Connection, cpu_limit_s: float) -> None:
        self.process, self.pipe, self._cpu_limit_s = process, pipe, cpu_limit_s
        assert process.pid is not None
        self._watch = Watch(process.pid)
        self.time = OwnTime(self._watch.totals, LOOK_EVERY_S)
        self.index: int | None = None
        self.limit_s = START_LIMIT_S
        self.ready = self.gone = self.late = False

    def take(self) -> Result | None:
        """Return the result of the row that it was given, where there is one now."""
        if self.index is None and self.ready:
            return None
        try:
            if self.pipe.poll():
                message = self.pipe.recv()
                if not self.ready:
                    self._begin(message)
                elif isinstance(message, UserError):
                    raise message
                elif message is AGAIN:
                    self.time.begin_again()
                else:
                    return message
                return None
        except (EOFError, OSError):
            self.process.join(timeout=60)  # it is ending, for which it needs a processor
            self.gone = True
            if not self.ready:
                raise UserError(f"a process of the reward ended while it started (exit code "
                                f"{self.process.exitcode}); see what it wrote above") from None
            return _ended(self.process.exitcode or 0, self._cpu_limit_s)
        now_s = time.monotonic()
        if now_s >= self.time.look_at_s:
            self.time.look(now_s)
        if self.time.own_s(now_s) < self.limit_s:
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

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._watch.close()


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
    end_with_command()
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
