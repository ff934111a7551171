"""The door to datatrove, whose executors run tasks: in processes of this machine, or as Slurm's arrays.

What is done is known by our own files, since the executor's marks know numbers of tasks only; each attempt
has a folder of logs of its own.  Its messages go to the logs of its tasks and not to the terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datatrove.utils.logging as engine_logging
import loguru._error_interceptor
import multiprocess
import psutil
from datatrove.executor import LocalPipelineExecutor
from loguru import logger
from multiprocess import resource_tracker
from multiprocess.forkserver import ensure_running

from data_prep.pipeline.tasks import Stage, Task, do_task
from megatron_sov.artifacts import disk_errors
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.runs.parent_death import die_with_parent
from megatron_sov.sealed import read_json, write_json

_ENDS_FORKS: list[int] = []
"""This process, while an executor is at work."""


def _end_with_command() -> None:
    if os.getppid() in _ENDS_FORKS:
        die_with_parent(os.getppid())


# the manager of the engine's processes would outlive a command that is killed, and hold its output open
os.register_at_fork(after_in_child=_end_with_command)
engine_logging.sys = SimpleNamespace(stderr=io.StringIO())
loguru._error_interceptor.sys = SimpleNamespace(stderr=None)  # a full disk is told by us, once
logger.remove()
TODO, FAILED = "tasks.json", "failed"
LOOK_EVERY_S = 0.5
_LOST = signal.SIGUSR2
"""Wakes the main thread when a worker is lost; not SIGINT, which may be ignored."""
RANKS_PER_WORKER = 16
"""Ranks that a worker may have, so that long tasks do not make the others wait for one."""
MAX_RESTARTS = 20
"""How often Slurm may requeue a job of an array before its time limit counts as too short."""


@dataclass(frozen=True)
class TaskList:
    """The one block of an executor's pipeline: does the tasks that a rank stands for."""

    plan_file: Path
    output: Path
    logs: Path
    stage: Stage
    parent: int = 0
    """Process that starts workers here; 0: Slurm starts them."""

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Do the tasks of a rank.

        Raises:
            UserError, Exception: one cannot be done; the sentence is kept beside the logs.
        """
        if self.parent not in (0, os.getpid()):
            _end_worker_with_command()
        at_work = self.logs / "at_work" / str(os.getpid())
        with keeping_failure(self.logs, rank), disk_errors(self.logs):
            at_work.parent.mkdir(exist_ok=True)
            if not self.parent:
                refuse_many_restarts(f"step {self.stage.kind}", "take smaller shard_bytes")
            for source, number in read_json(self.logs / TODO)[rank]:
                at_work.write_text(json.dumps([source, number]))
                do_task(self.plan_file, self.output, self.stage, (source, number))
        at_work.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _end_worker_with_command() -> None:
    """Have this worker end with the process that it was forked from, and with the command: that one goes
    when its last worker is gone."""
    die_with_parent(os.getppid())
    threading.Thread(target=_wait_for_command, daemon=True).start()


def _wait_for_command() -> None:
    command = multiprocess.parent_process()
    if command is not None:
        command.join()
    os._exit(ExitCode.CRASH)


def refuse_many_restarts(what: str, way: str) -> None:
    """Raise `UserError` where Slurm has put a job back so often that it will never be done."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > MAX_RESTARTS:
        raise UserError(f"{what}: this job has been requeued {MAX_RESTARTS} times and is not done; give it a "
                        f"longer time limit, or {way}")


@contextlib.contextmanager
def keeping_failure(logs: Path, rank: int) -> Iterator[None]:
    """Keep beside the logs what a rank fails of, for the command that asks later; a disk that takes no note
    is no reason to fail of anything else."""
    try:
        yield
    except Exception as e:
        failed = logs / FAILED / f"{rank:05d}.json"
        with contextlib.suppress(OSError, UserError):
            failed.parent.mkdir(exist_ok=True)
            write_json(failed, {"is_user_error": isinstance(e, UserError), "sentence": str(e),
                                "trace": "".join(traceback.format_exception(e))})
        raise


class _WorkerLost(Exception):
    """A worker was ended from outside; says which and at what."""


class TaskFailed(Exception):
    """A defect in a task; what is told has its trace."""


def prepare(logs: Path, todo: Sequence[Task], num_ranks: int) -> None:
    """Make the folder of an attempt's logs anew, and deal its tasks out to the executor's ranks."""
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    write_json(logs / TODO, [todo[rank::num_ranks] for rank in range(num_ranks)])


def run_here(plan_file: Path, output: Path, stage: Stage, todo: Sequence[Task], workers: int,
             progress: Any) -> None:
    """Do tasks in processes of this machine.

    Args:
        plan_file: the plan.
        output: the run's folder.
        stage: what they belong to.
        todo: the tasks.
        workers: processes; 1: this one does them.
        progress: called now and then, from another thread.

    Raises:
        UserError: the first task that could not be done because of the user's data, settings or disk, or
            whose process was ended from outside.
        TaskFailed: a defect.
    """
    logs = output / "logs" / stage.name
    workers = min(workers, len(todo))
    # a rank costs some milliseconds of its own: many small tasks share one
    num_ranks = 1 if workers == 1 else min(len(todo), workers * RANKS_PER_WORKER)
    prepare(logs, todo, num_ranks)
    if workers > 1:
        _start_server_of_workers()
    executor = LocalPipelineExecutor(
        [TaskList(plan_file, output, logs, stage, os.getpid())], tasks=num_ranks, workers=workers,
        logging_dir=str(logs), skip_completed=False)
    try:
        _ENDS_FORKS.append(os.getpid())
        with _watched(logs, progress):
            executor.run()
    except _WorkerLost as e:
        raise_failures(logs)  # of which one ends the other workers
        raise UserError(f"step {stage.kind}: {e} (the system may have run out of memory); take fewer "
                        "--workers or smaller shard_bytes, and run the command again") from None
    except Exception as e:
        raise_failures(logs)
        if isinstance(e, (UserError, OSError)):  # the disk took no note of it
            raise
        raise TaskFailed(f"step {stage.kind}: {e}") from e
    finally:
        _ENDS_FORKS.clear()


def _start_server_of_workers() -> None:
    """Start the process that workers are forked from, so that they never see Ctrl-C, which goes to all of a
    terminal's: this process alone takes it, and ends them."""
    multiprocess.set_forkserver_preload(["data_prep.pipeline.engine"])
    resource_tracker.ensure_running()  # where it is started later, that takes the block away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_failures(logs: Path) -> None:
    """Raise what the tasks of an attempt have told, if any."""
    found = [read_json(file) for file in sorted((logs / FAILED).glob("*.json"))]
    if not found:
        return
    more = f" (and {len(found) - 1} other tasks: {logs / FAILED})" if len(found) > 1 else ""
    first = next((one for one in found if not one["is_user_error"]), found[0])
    if first["is_user_error"]:
        raise UserError(f"{first['sentence']}{more}")
    raise TaskFailed(f"{first['trace']}{more}")


@contextlib.contextmanager
def _watched(logs: Path, progress: Any) -> Iterator[None]:
    """Look after worker processes from a thread: a pool waits for ever for one that was killed.

    Raises:
        _WorkerLost: one was.
    """
    lost: list[str] = []
    over = threading.Event()

    def tell(*_: Any) -> None:
        raise _WorkerLost(lost[0])

    def interrupt(*arguments: Any) -> None:
        over.set()  # workers end from now on because this process ends them
        interrupted(*arguments)

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            progress()
            for file in (logs / "at_work").glob("*"):
                with contextlib.suppress(OSError, ValueError):
                    task = json.loads(file.read_text(encoding="utf-8"))
                    if not _is_alive(int(file.name)) and file.exists() and not over.is_set():
                        lost.append(f"process {file.name} was ended from outside while it did task "
                                    f"{task[1]} of source {task[0]}")
                        signal.pthread_kill(threading.main_thread().ident or 0, _LOST)
                        return

    if threading.current_thread() is not threading.main_thread():  # which alone takes signals
        yield
        return
    before = signal.signal(_LOST, tell)
    interrupted: Any = signal.getsignal(signal.SIGINT)
    if callable(interrupted):
        signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(_LOST, before)
        if callable(interrupted):
            signal.signal(signal.SIGINT, interrupted)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
