"""Running a reward over batches of rows: in processes of its own, each row with a limit of time and memory,
or in threads where it waits for an endpoint.

A reward that hangs, or a response that makes a verifier eat the machine, costs its row and nothing else.
Whose fault it is follows from what was used. A judge that has used its time of a processor, its memory or its
stack, where the same row with an ordinary response takes nothing of the kind, was kept busy by the response:
that is worth 0, else a policy could escape a bad grade. A judge that the clock has run out on waits for
something: its row is judged once more, and has no reward then. What it waits for a processor does not count.
"""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_sov.base.plugins.registry import PluginOrder
from megatron_sov.judge.rewards.composed import ComposedRunner, Runner
from megatron_sov.judge.rewards.registry import BUILT_IN, MadeReward, build
from megatron_sov.judge.rewards.reward import Result, Reward, Row, agreeing, judged
from megatron_sov.work.processes.children import MAX_MEMORY_BYTES, forget_other_variables, limit_memory
from megatron_sov.work.processes.workers import Answer, Lost, Workers

TIME_LIMIT_S = 30.0
"""Per row, where a reward has no setting `time_limit_s`."""
CHECKED_TWICE, EVERY = 32, 32
"""The first rows, and one of so many behind them, are judged twice: a reward must not change by itself."""
FAULTS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE,
                    signal.SIGILL))
"""Signals that end a process for what it does itself: its time of a processor is over, its stack, ..."""


def runner(asked: PluginOrder, made: MadeReward, workers: int) -> Runner:
    """Return what runs a reward.

    Args:
        asked: the reward's order, from which processes make their own.
        made: the reward of this process.
        workers: processes; a reward that waits for an endpoint says itself how many threads it wants.
    """
    reward: Any = made.reward
    if made.parts:
        return ComposedRunner(reward, {name: runner(*part, workers) for name, part in made.parts.items()})
    if hasattr(reward, "threads"):
        return ThreadRunner(reward, reward.threads)
    # a file of a user's is no module that can be found by name, and is run by each process
    modules = [type(reward).__module__, *getattr(reward, "PRELOAD", ())] if asked.name in BUILT_IN else []
    workers = min(workers, getattr(reward, "MAX_WORKERS", workers))
    return ProcessRunner(asked, getattr(reward, "time_limit_s", TIME_LIMIT_S), workers, modules,
                         getattr(reward, "VARIABLES", ()), control=getattr(reward, "CONTROL", None),
                         cpu_limit_s=getattr(reward, "cpu_limit_s", math.inf))


class ThreadRunner(Runner):
    """A reward that waits for others, in threads of this process: they share its limits of rate and cost."""

    def __init__(self, reward: Reward, threads: int) -> None:
        self._reward, self._pool = reward, ThreadPoolExecutor(threads)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return list(self._pool.map(lambda row: judged(self._reward, row), rows))


class ProcessRunner(Runner):
    """A reward in `workers` processes; a context, since processes have to end.

    Args:
        asked: which reward.
        time_limit_s: for a row.
        workers: processes.
        modules: what the reward needs and can be found by name; imported once for all processes.
        variables: of the environment that it needs, beside those of `KEPT_VARIABLES`.
        cpu_limit_s: of a processor, for a row; infinite: the clock alone counts.
        control: a response that takes nothing to judge: where a row passes a limit with its own response and
            not with this one, its response is worth 0; None: rows that pass a limit have no reward.
    """

    def __init__(self, asked: PluginOrder, time_limit_s: float, workers: int, modules: Sequence[str] = (),
                 variables: Sequence[str] = (), *, cpu_limit_s: float = math.inf,
                 control: str | None = None) -> None:
        self._time_limit_s, self._cpu_limit_s, self._control = time_limit_s, cpu_limit_s, control
        self._workers = Workers("the reward", _judge, (asked, tuple(variables), cpu_limit_s), num=workers,
                                modules=modules)
        self._num_seen = 0

    def __exit__(self, *error: object) -> None:
        self._workers.end()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        results: dict[int, Result] = {}
        suspects: dict[int, Result] = {}
        late: set[int] = set()
        # (row, whether it is judged twice)
        places = range(self._num_seen, self._num_seen + len(rows))
        waiting = deque((i, (dict(row), place < CHECKED_TWICE or place % EVERY == 0))
                        for i, (place, row) in enumerate(zip(places, rows, strict=True)))
        for i, answer in self._workers.answers(waiting, self._time_limit_s):
            result = self._lost(answer.exit_code) if isinstance(answer, Lost) else Result(**answer)
            if i in suspects:
                results[i] = _blamed(suspects[i], result)
            elif result.spent and self._control is not None:
                suspects[i] = result
                waiting.append((i, ({**rows[i], "response": self._control}, False)))
            elif answer == Lost(None) and self._control is not None and i not in late:
                late.add(i)
                waiting.append((i, (dict(rows[i]), False)))
            else:
                results[i] = result
        self._num_seen += len(rows)
        return [results[i] for i in range(len(rows))]

    def _lost(self, exit_code: int | None) -> Result:
        """Return the result of a row whose process has ended, or had to."""
        if exit_code is None:
            return Result(None, "timeout", {}, f"took longer than {self._time_limit_s:g} s")
        if exit_code == -signal.SIGPROF:
            return Result(None, "timeout", {}, f"judging took longer than {self._cpu_limit_s:g} s of a "
                                               "processor", spent=True)
        return Result(None, "failed", {}, f"the process that judged it ended (exit code {exit_code})",
                      spent=-exit_code in FAULTS)


def _blamed(suspect: Result, control: Result) -> Result:
    """Return the result of a row that passed a limit, from the one that it has with an ordinary response."""
    if control.reward is None:
        return suspect
    reason = f"the response: {suspect.reason}"
    return Result(0.0, "timeout" if suspect.status == "timeout" else "scored", {"why": reason}, reason)


def _judge(asked: PluginOrder, variables: Sequence[str], cpu_limit_s: float) -> Answer:
    """Return what judges rows, in a process of the reward."""
    forget_other_variables(variables)
    reward = build(asked)
    if hasattr(reward, "prepare"):
        reward.prepare()
    limit_memory(getattr(reward, "MAX_MEMORY_BYTES", MAX_MEMORY_BYTES))

    def answer(request: tuple[Row, bool], again: Callable[[], None]) -> dict[str, Any]:
        row, twice = request
        result = _judged_in(cpu_limit_s, reward, row)
        if twice and result.reward is not None:
            again()  # each has the whole time
            result = agreeing(result, _judged_in(cpu_limit_s, reward, row))
        return vars(result)

    return answer


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
