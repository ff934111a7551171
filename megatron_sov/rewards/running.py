"""Running a reward over batches of rows: in processes, or in threads where it waits for an endpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.composed import ComposedRunner
from megatron_sov.rewards.processes import TIME_LIMIT_S, ProcessRunner
from megatron_sov.rewards.registry import BUILT_IN, Made
from megatron_sov.rewards.reward import Result, Reward, Row, judged


class Runner(Protocol):
    """Scores batches; a context, since what it started has to end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of rows, in their order."""
        ...


def runner(asked: Order, made: Made, workers: int) -> Runner:
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


class ThreadRunner:
    """A reward that waits for others, in threads of this process: they share its limits of rate and cost."""

    def __init__(self, reward: Reward, threads: int) -> None:
        self._reward, self._pool = reward, ThreadPoolExecutor(threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of rows, in their order."""
        return list(self._pool.map(lambda row: judged(self._reward, row), rows))
