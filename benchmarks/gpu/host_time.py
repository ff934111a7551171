"""Show what a training step spends its time on: GPU kernels, driver calls, waits, Python functions
and the allocator."""

import contextlib
import cProfile
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

NUM_KERNELS, NUM_CALLS, NUM_FUNCTIONS = 25, 15, 60
"""Slowest kernels, driver calls and Python functions that are reported."""
ALLOCATOR_COUNTS = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_sync_all_streams",
                    "allocation.all.allocated")
"""Counters of `torch.cuda.memory_stats`; the first two count the allocator's calls of the driver."""


def profile_device(step: Callable[[], object]) -> dict[str, Any]:
    """Return `attribute_events` of a step that torch's profiler records without CPU operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    return attribute_events(profile.key_averages())


def attribute_events(events: Iterable[Any]) -> dict[str, Any]:
    """Split averaged profiler events into kernels, with device time, and driver calls, with host time.

    The profiler lists CUDA's runtime and driver calls next to the kernels that they launch; only their device
    type differs.

    Returns:
        "kernels" and "driver calls": slowest name -> (milliseconds, count); "all": sums over every name.
    """
    kernels, calls = [], []
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((event.key[:100], event.self_device_time_total / 1e3, event.count))
        else:
            calls.append((event.key[:100], event.self_cpu_time_total / 1e3, event.count))
    return {"kernels": _list_slowest(kernels, NUM_KERNELS), "driver calls": _list_slowest(calls, NUM_CALLS)}


def _list_slowest(rows: list[tuple[str, float, int]], number: int) -> dict[str, tuple[float, int]]:
    slowest = sorted(rows, key=lambda row: -row[1])[:number]
    total = (sum(row[1] for row in rows), sum(row[2] for row in rows))
    return {"all": total} | {name: (ms, count) for name, ms, count in slowest}


def profile_functions(step: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Return (FILE:LINE:FUNCTION, calls, own milliseconds) of the slowest Python functions of a step."""
    profile = cProfile.Profile()
    profile.runcall(step)
    stats: Any = pstats.Stats(profile)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:NUM_FUNCTIONS]
    return [(f"{Path(file).name}:{line}:{name}", calls, 1e3 * own_s)
            for (file, line, name), (_, calls, own_s, _, _) in rows]


@contextlib.contextmanager
def count_waits() -> Iterator[dict[str, list[float]]]:
    """Yield FILE:FUNCTION -> [milliseconds, count] of waits for events, streams and the device inside the
    `with` block. Copies that wait, such as `item`, are driver calls instead (`profile_device`)."""
    waits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def time_calls(wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            start_s = time.perf_counter()
            result = wait(*args, **kwargs)
            row = waits[f"{Path(caller.co_filename).name}:{caller.co_name}"]
            row[0] += 1e3 * (time.perf_counter() - start_s)
            row[1] += 1
            return result
        return call

    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
            if hasattr(owner, "synchronize"):  # the stand-ins of a dry run (fake_gpu.py) may lack it
                stack.enter_context(patch.object(owner, "synchronize", time_calls(owner.synchronize)))
        yield waits


@contextlib.contextmanager
def count_allocations() -> Iterator[dict[str, int]]:
    """Yield a dictionary that gets the increase of `ALLOCATOR_COUNTS` at the end of the `with` block."""
    before, increase = torch.cuda.memory_stats(), dict[str, int]()
    yield increase
    after = torch.cuda.memory_stats()
    increase |= {name: after.get(name, 0) - before.get(name, 0) for name in ALLOCATOR_COUNTS}
