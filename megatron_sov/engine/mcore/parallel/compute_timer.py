"""How long this process computes in a step, without what it waits for others."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.engine.mcore.parallel.device import on_gpu

_waited_s = 0.0
_counting = False


def _count_waiting() -> None:
    """Have every wait for a collective add to `_waited_s`: all of torch's collectives on CPU tensors
    end in `Work.wait`."""
    global _counting
    if _counting:
        return
    _counting = True
    work_class: Any = dist.Work
    wait = work_class.wait

    def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
        global _waited_s
        start_s = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            _waited_s += time.perf_counter() - start_s

    work_class.wait = timed


class ComputeClock:
    """Measures forward and backward passes up to the moment when gradients are summed over
    data-parallel processes.

    On a CPU the time in collectives (of tensor, expert, context and pipeline parallelism) is taken away, so
    the figure is the process's own.  On a GPU the host does not wait; there it is the time of the device up
    to that moment, which the processes of one model replica share.
    """

    def __init__(self) -> None:
        self._on_gpu = on_gpu()
        self._start: Any = None
        self._stop: Any = None
        if not self._on_gpu:
            _count_waiting()

    def start(self) -> None:
        """Begin a step's computation."""
        self._stop = None
        self._start = self._now()

    def stop(self) -> None:
        """End it."""
        self._stop = self._now()

    def seconds(self) -> float:
        """Return the seconds between `start` and `stop`; on a GPU this waits for `stop`."""
        if self._on_gpu:
            self._stop.synchronize()
            return float(self._start.elapsed_time(self._stop)) / 1e3
        return float(self._stop - self._start)

    def _now(self) -> Any:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter() - _waited_s
