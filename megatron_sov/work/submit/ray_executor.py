"""Execute items in processes of a Ray cluster, for sites without Slurm and for steps that hold GPUs.

Ray schedules: each process requests a core and GPUs and receives items once placed. The command alone writes
the journal. A process lost with its node is restarted elsewhere, and its item is repeated.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, format_error, format_install_command
from megatron_sov.work.processes.pool import WAITING_PER_WORKER
from megatron_sov.work.progress.jobs import Executor, Numbered, Work

MAX_LOSSES = 3
"""Maximum lost processes per item; beyond, the item counts as the cause."""


def ray_executor(build: Callable[..., Callable[[Work], bytes]], arguments: tuple[Any, ...], workers: int,
                 address: str, *, gpus: float = 0.0) -> Executor[Work]:
    """Return an executor with Ray actors on a cluster.

    Args:
        build: see `pool.WorkerPool`; its module must be importable on all nodes.
        arguments: plain values.
        workers: maximum number of processes.
        address: HOST:PORT of the head node, or "auto" on a cluster node.
        gpus: GPUs per process, possibly fractional.
    """
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        ray = _connect_ray(address)
        try:
            kind = ray.remote(num_cpus=1, num_gpus=gpus)(_RayWorker)
            processes = _RayProcesses(ray, lambda: kind.remote(build, arguments), workers)
            yield from _iter_records(processes, items)
        finally:
            ray.shutdown()  # ends the actors

    return execute


class _RayWorker:
    """Ray actor. The first item triggers `build`, and build errors surface as `RayTaskError`."""

    def __init__(self, build: Callable[..., Callable[[Any], bytes]], arguments: tuple[Any, ...]) -> None:
        self._build, self._arguments = build, arguments
        self._do: Callable[[Any], bytes] | None = None

    def is_there(self) -> bool:
        return True

    def do(self, item: Any) -> bytes:
        if self._do is None:
            self._do = self._build(*self._arguments)
        return self._do(item)


def _connect_ray(address: str) -> Any:
    """Return the `ray` module, connected to the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # optional package
    except ImportError:
        raise UserError(f"--ray {address}: Ray is not installed; install it with "
                        f"{format_install_command('ray')}") from None
    # nodes share a file system; prefer this code over installed packages
    code = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    try:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": code}})
    except (ConnectionError, ValueError, RuntimeError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"--ray {address}: cannot connect to a Ray cluster ({reason}); start a cluster with "
                        "`ray start --head` and pass the HOST:PORT that it prints, or pass auto on a node"
                        ) from None
    return ray


@dataclass(eq=False)
class _RayTask:
    number: int
    item: Any
    record: bytes | None = None
    losses: int = 0
    """Number of processes lost while working on the item."""


class _RayProcesses:
    """The command's Ray actors. A lost actor is replaced, and the next free actor repeats the lost item: with
    Ray's own restarts the item would wait for an occupied slot."""

    def __init__(self, ray: Any, start: Callable[[], Any], workers: int) -> None:
        self._ray, self._start, self.max_waiting = ray, start, WAITING_PER_WORKER * workers
        self.pending: dict[Any, tuple[Any, _RayTask | None]] = {}
        self.idle: list[Any] = []
        self._lost: deque[_RayTask] = deque()
        for _ in range(workers):
            self._start_process()

    def _start_process(self) -> None:
        actor = self._start()
        self.pending[actor.is_there.remote()] = actor, None

    def give(self, task: _RayTask) -> None:
        actor = self.idle.pop()
        self.pending[actor.do.remote(task.item)] = actor, task

    def wait(self) -> None:
        """Wait until a process has started, finished its item, or died; requeue items of dead processes."""
        (reference,), _ = self._ray.wait(list(self.pending), num_returns=1)
        actor, task = self.pending.pop(reference)
        try:
            record = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, UserError):
                raise UserError(str(e.cause)) from None
            raise
        except self._ray.exceptions.RayActorError as e:
            if task is not None:
                task.losses += 1
                if task.losses == MAX_LOSSES:
                    raise UserError(f"{MAX_LOSSES} processes were lost with the same item, the last one so: "
                                    f"{format_error(e)}; see Ray's logs of it") from None
                self._lost.append(task)
            self._start_process()
        else:
            if task is not None:
                task.record = bytes(record)
            self.idle.append(actor)
        if self.idle and self._lost:
            self.give(self._lost.popleft())


def _iter_records(processes: _RayProcesses, items: Numbered[Any]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, record) in the order of the items while the processes compute later items."""
    remaining = iter(items)
    order: deque[_RayTask] = deque()
    is_exhausted = False
    while True:
        # bounded: finished records wait in `order` for the slowest earlier item
        while not is_exhausted and len(order) < processes.max_waiting and processes.idle:
            number, item = next(remaining, (-1, None))
            is_exhausted = number < 0
            if not is_exhausted:
                order.append(_RayTask(number, item))
                processes.give(order[-1])
        while order and order[0].record is not None:
            task = order.popleft()
            yield task.number, task.record or b""
        if is_exhausted and not order:
            return
        if processes.pending:
            processes.wait()
