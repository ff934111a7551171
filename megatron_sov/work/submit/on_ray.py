"""Items done by processes of a Ray cluster: for a lab without Slurm, and for steps that hold GPUs.

Scheduling is Ray's: each process asks for a core and its GPUs, and gets items once Ray has found a place for
it.  What is done is known by the journal of the command, which alone writes; a process that is lost with its
node is started elsewhere, and its item is done again.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, how_to_install, told_in_a_line
from megatron_sov.work.processes.pool import WAITING_PER_WORKER
from megatron_sov.work.progress.jobs import Executor, Numbered, Work

MAX_LOSSES = 3
"""Processes that may be lost with one item, before it counts as their end."""


def on_ray(build: Callable[..., Callable[[Work], bytes]], arguments: tuple[Any, ...], workers: int,
           address: str, *, gpus: float = 0.0) -> Executor[Work]:
    """Return what does items in processes of a cluster.

    Args:
        build: see `pool.WorkerPool`; its module is importable on all nodes.
        arguments: plain values.
        workers: processes at most; fewer where the cluster has no place for them.
        address: HOST:PORT of the cluster's head, or "auto" on one of its nodes.
        gpus: of each process, or a part of one.
    """
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        ray = _connected(address)
        try:
            kind = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
            processes = _Processes(ray, lambda: kind.remote(build, arguments), workers)
            yield from _done(processes, items)
        finally:
            ray.shutdown()  # ends the processes, as the end of this one does

    return execute


class _Worker:
    """A process of the cluster; what it does is built with the first item, whose error is told."""

    def __init__(self, build: Callable[..., Callable[[Any], bytes]], arguments: tuple[Any, ...]) -> None:
        self._build, self._arguments = build, arguments
        self._do: Callable[[Any], bytes] | None = None

    def is_there(self) -> bool:
        return True

    def do(self, item: Any) -> bytes:
        if self._do is None:
            self._do = self._build(*self._arguments)
        return self._do(item)


def _connected(address: str) -> Any:
    """Return the library, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"--ray {address}: Ray is not installed; install it with {how_to_install('ray')}"
                        ) from None
    # nodes see the same disk; this code goes before what is installed there
    code = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    try:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": code}})
    except (ConnectionError, ValueError, RuntimeError) as e:
        told = str(e).strip().partition("\n")[0]
        raise UserError(f"--ray {address}: no Ray cluster can be joined there ({told}); start one with `ray "
                        "start --head`, and name HOST:PORT as that prints it, or auto on one of its nodes"
                        ) from None
    return ray


@dataclass(eq=False)
class _RayTask:
    """An item, and its record when it is there."""

    number: int
    item: Any
    record: bytes | None = None
    losses: int = 0
    """Processes that were lost with it."""


class _Processes:
    """The processes of a command.  One that is lost is replaced, and its item given to the next that is free:
    with Ray's own restarts it would wait for a place that the others do not give away."""

    def __init__(self, ray: Any, start: Callable[[], Any], workers: int) -> None:
        self._ray, self._start, self.most = ray, start, WAITING_PER_WORKER * workers
        self._starting: dict[Any, Any] = {}
        self._working: dict[Any, tuple[Any, _RayTask]] = {}
        self._idle: list[Any] = []
        self._lost: deque[_RayTask] = deque()
        for _ in range(workers):
            self._begin_one()

    def _begin_one(self) -> None:
        actor = self._start()
        self._starting[actor.is_there.remote()] = actor

    @property
    def is_free(self) -> bool:
        return bool(self._idle)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: the slowest item has held all others up, and is done."""
        return not self._working and not self._starting

    def give(self, task: _RayTask) -> None:
        actor = self._idle.pop()
        self._working[actor.do.remote(task.item)] = actor, task

    def wait(self) -> None:
        """Wait until a process has started, has done its item, or is lost, whose item is given on."""
        # one at a time: starts and items end in the same wait, and their table says which it was
        (reference,), _ = self._ray.wait([*self._working, *self._starting], num_returns=1)
        actor, task = self._working.pop(reference, (self._starting.pop(reference, None), None))
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
                                    f"{told_in_a_line(e)}; see Ray's logs of it") from None
                self._lost.append(task)
            self._begin_one()
        else:
            if task is not None:
                task.record = bytes(record)
            self._idle.append(actor)
        if self._idle and self._lost:
            self.give(self._lost.popleft())


def _done(processes: _Processes, items: Numbered[Any]) -> Iterator[tuple[int, bytes]]:
    """Yield records in the order of their items."""
    left = iter(items)
    order: deque[_RayTask] = deque()
    is_over = False
    while True:
        # bounded: results wait in `order` for the slowest item before them
        while not is_over and len(order) < processes.most and processes.is_free:
            number, item = next(left, (-1, None))
            is_over = number < 0
            if not is_over:
                order.append(_RayTask(number, item))
                processes.give(order[-1])
        while order and order[0].record is not None:
            task = order.popleft()
            yield task.number, task.record or b""
        if is_over and not order:
            return
        if not processes.is_idle:
            processes.wait()
