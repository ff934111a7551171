"""Tasks of a run in processes of this machine."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.pipeline.tasks import Stage, Task, do_task
from megatron_sov.artifacts import disk_errors
from megatron_sov.errors import UserError
from megatron_sov.work.arrays import TaskFailed
from megatron_sov.work.pool import LOST, WAITING_PER_WORKER, WorkerPool

LOOK_EVERY_S = 0.5
DoTasks = Callable[[Stage, Sequence[Task], Callable[[], None]], None]


@contextmanager
def tasks_here(plan_file: Path, output: Path, workers: int) -> Iterator[DoTasks]:
    """Give what does tasks of a stage, and calls its last argument now and then meanwhile.

    Args:
        plan_file: the plan.
        output: the run's folder.
        workers: processes, which are the same for all stages; 1: this one does the tasks.

    Raises:
        UserError: the first task that could not be done because of the user's data, settings or disk, or a
            process was ended from outside.
        TaskFailed: a defect.
    """
    if workers == 1:
        yield partial(_do_alone, _doer(plan_file, output))
        return
    pool = WorkerPool(_doer, (plan_file, output), workers)
    try:
        yield partial(_do_together, pool, workers * WAITING_PER_WORKER)
    except BaseException:
        pool.kill()
        raise
    pool.end()


def _doer(plan_file: Path, output: Path) -> Callable[[tuple[Stage, Task]], None]:
    def do(item: tuple[Stage, Task]) -> None:
        stage, task = item
        try:
            with disk_errors(output):
                do_task(plan_file, output, stage, task)
        except UserError:
            raise
        except Exception as e:  # of another process its notes would be lost
            raise TaskFailed(f"step {stage.kind}: {''.join(traceback.format_exception(e))}") from None

    return do


def _do_alone(do: Callable[[tuple[Stage, Task]], None], stage: Stage, todo: Sequence[Task],
              progress: Callable[[], None]) -> None:
    for task in todo:
        do((stage, task))
        progress()


def _do_together(pool: WorkerPool[tuple[Stage, Task], None], most: int, stage: Stage, todo: Sequence[Task],
                 progress: Callable[[], None]) -> None:
    waiting = deque(todo)
    under_way: dict[Future[Any], Task] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < most:
                task = waiting.popleft()
                under_way[pool.submit((stage, task))] = task
            for future in wait(under_way, LOOK_EVERY_S, FIRST_COMPLETED).done:
                future.result()
                del under_way[future]
            progress()
    except BrokenProcessPool:
        raise UserError(f"step {stage.kind}: {LOST} while tasks were done of which these are not: "
                        f"{_named(list(under_way.values()))}; take fewer --workers or smaller shard_bytes, "
                        "and run the command again") from None


def _named(open_tasks: list[Task]) -> str:
    named = [f"{number} of source {source}" for source, number in open_tasks[:WAITING_PER_WORKER]]
    more = len(open_tasks) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
