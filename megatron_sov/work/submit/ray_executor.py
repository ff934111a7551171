"""Execute items as tasks on a Ray cluster, for sites without Slurm and for steps that hold GPUs.

Ray schedules: each task requests a core and GPUs, and is repeated elsewhere if its process is lost. The
command alone writes the journal.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, format_error, format_install_command
from megatron_sov.work.processes.pool import WAITING_PER_WORKER
from megatron_sov.work.progress.jobs import Executor, Numbered, Work

MAX_LOSSES = 3
"""Maximum lost processes per item; beyond, the item counts as the cause."""
_steps: dict[str, Callable[[Any], bytes]] = {}
"""In a process on the cluster: job id -> function for items."""


def ray_executor(build: Callable[..., Callable[[Work], bytes]], arguments: tuple[Any, ...], workers: int,
                 address: str, *, gpus: float = 0.0) -> Executor[Work]:
    """Return an executor with tasks on a Ray cluster.

    Args:
        build: see `pool.WorkerPool`; its module must be importable on all nodes.
        arguments: plain values.
        workers: maximum number of processes.
        address: HOST:PORT of the head node, or "auto" on a cluster node.
        gpus: GPUs per process, possibly fractional.
    """
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        ray, job = _connect_ray(address), uuid.uuid4().hex
        # max_calls = 0: by default, Ray ends a process with a GPU, and its model, after each item
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=0, max_retries=MAX_LOSSES - 1)(_execute_item)
        try:
            yield from _iter_records(ray, lambda item: task.remote(job, build, arguments, item), workers,
                                     items)
        finally:
            ray.shutdown()

    return execute


def _execute_item(job: str, build: Callable[..., Callable[[Any], bytes]], arguments: tuple[Any, ...],
                  item: Any) -> bytes:
    """Execute an item in a process on the cluster, which builds the step with its first item."""
    if job not in _steps:
        _steps[job] = build(*arguments)
    return _steps[job](item)


def _iter_records(ray: Any, start: Callable[[Any], Any], workers: int, items: Numbered[Any]
                  ) -> Iterator[tuple[int, bytes]]:
    """Yield (number, record) in input order, with at most `workers` unfinished tasks."""
    order: deque[tuple[int, Any]] = deque()
    running: list[Any] = []
    for number, item in items:
        if len(running) == workers:
            _, running = ray.wait(running, num_returns=1)
        reference = start(item)
        running.append(reference)
        order.append((number, reference))
        # bounded: finished records wait in `order` for the slowest earlier item
        while order and (order[0][1] not in running or len(order) > WAITING_PER_WORKER * workers):
            yield _get_record(ray, *order.popleft())
    for number, reference in order:
        yield _get_record(ray, number, reference)


def _get_record(ray: Any, number: int, reference: Any) -> tuple[int, bytes]:
    try:
        return number, bytes(ray.get(reference))
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UserError):
            raise UserError(str(e.cause)) from None
        raise
    except ray.exceptions.RayError as e:
        raise UserError(f"{MAX_LOSSES} processes were lost with the same item, the last one so: "
                        f"{format_error(e)}; see Ray's logs of it") from None


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
