"""All that watches a run: routing, slow processes and hardware that lies here; the watch over a step and the
refusal of steps in files of their own.  Settings are in `guards.*`."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.errors import SilentCorruption, warn
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import GuardConfig
from megatron_sov.runs.obs import routing
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.guards.fault_injection import Fault, FaultInjector
from megatron_sov.train.guards.step_guard import StepGuard
from megatron_sov.train.guards.watchdog import Watchdog

# How long this process computes in a step, without what it waits for others.

_waited_s = 0.0
_counting = False


def _count_waiting() -> None:
    """Have every wait for a collective add to `_waited_s`: all of torch's collectives on CPU tensors
    end in `Work.wait`."""
    global _counting
    # once a process: a patched patch would count every wait twice
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
        self._stop = None
        self._start = self._now()

    def stop(self) -> None:
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
        # a clock that stands still while a collective is waited for
        return time.perf_counter() - _waited_s


# Checks for hardware that lies: bits that should be equal are compared, and the process that differs is
# named.

class SdcChecks:
    """Compares replicas of weights, and repetitions of a computation."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings

    def is_probe_due(self, step: int) -> bool:
        """Return whether a micro-batch is computed twice in this step (1-based)."""
        return self._settings.probe_every_steps > 0 and step % self._settings.probe_every_steps == 0

    def repeat(self, step: int, model: LanguageModel, compute: Callable[[int], None],
               events: EventLog) -> None:
        """Compute twice and compare the gradients; called by all processes together.

        Args:
            compute: runs forward and backward passes (turn 0, then 1) that leave this process's own
                gradients in the model.
        """
        found = []
        for turn in range(2):
            compute(turn)
            found.append([int(replica_checks.compute_checksum([g]))
                          for g in replica_checks.list_gradients(model)])
        self._measure(step, replica_checks.gather_ranks_where(found[0] != found[1]),
                      "the same micro-batch gave other gradients when it was computed again", events)

    def compare(self, step: int, model: LanguageModel, events: EventLog) -> None:
        """Compare the weights that several processes hold; called by all processes together,
        before a checkpoint."""
        if self._settings.compare_replicas:
            self._measure(step, replica_checks.find_differing_replicas(model),
                          "weights differ from those of their replicas", events)

    def _measure(self, step: int, ranks: list[int], what: str, events: EventLog) -> None:
        if not ranks:
            return
        hosts = gather_objects(platform.node())
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        text = f"silent corruption after step {step}: {what} ({named})"
        fields = {"step": step, "ranks": ranks, "hosts": [hosts[r] for r in ranks]}
        # `ranks` is the same everywhere, so all raise and none stays behind in a collective
        if self._settings.on_sdc == "exit":
            events.write("sdc", **fields, text=text)
            raise SilentCorruption(f"{text}; nothing is saved from here on, "
                                   "test that machine before it is used again")
        if dist.get_rank() == 0:
            warn(text, events.write, "sdc", **fields)


# Slow processes: everyone waits for the slowest one, and nobody's step time shows which it is.

MAX_SHOWN_RANKS = 64
"""Of more processes than these only the slowest ones are recorded."""


class Stragglers:
    """Averages each process's computing time, and names those far above the median."""

    def __init__(self, settings: GuardConfig) -> None:
        self._every, self._ratio = settings.straggler_every_steps, settings.straggler_ratio
        self.clock = ComputeClock() if self._every else None
        self._total_s, self._steps = 0.0, 0

    def report(self, step: int, events: EventLog) -> None:
        """Take a step in (1-based); at the end of a stretch compare the processes, all of them together."""
        if self.clock is None:
            return
        self._total_s += self.clock.seconds()
        self._steps += 1
        if step % self._every:
            return
        compute_s = collectives.gather_numbers(self._total_s / self._steps)
        self._total_s, self._steps = 0.0, 0
        # of two processes the lower one: the mean of both would hide the slower
        median_s = statistics.median_low(compute_s)
        slowest = sorted(range(len(compute_s)), key=lambda rank: -compute_s[rank])[:MAX_SHOWN_RANKS]
        slow = [rank for rank in slowest if compute_s[rank] > self._ratio * median_s]
        events.write("compute_time", step=step, median_s=median_s,
                     seconds={str(r): compute_s[r] for r in sorted(slowest)}, slow=slow)
        for rank in slow:
            events.write("alarm", step=step, kind="slow process", rank=rank,
                         text=f"rank {rank} computes {compute_s[rank]:.3g} s a step, the median process "
                              f"{median_s:.3g} s")


# The watch over expert routing: records of every layer, and alarms when one collapses.

MAX_SHOWN = 8
"""Experts that an alarm names."""


class RoutingMonitor:
    """Records the figures of each routed layer now and then; an alarm comes once,
    and again only when it had passed."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self._idle: np.ndarray | None = None  # records in a row without a token, [layers, experts]
        self._active: set[tuple[str, int]] = set()

    def is_due(self, step: int) -> bool:
        return self._settings.routing_every_steps > 0 and step % self._settings.routing_every_steps == 0

    def follow(self, step: int, load: torch.Tensor, biases: torch.Tensor, events: EventLog) -> None:
        """Take in [layers, experts] token counts and selection biases; rows of dense layers are zero."""
        layers = torch.nonzero(load.sum(dim=1) > 0).flatten()
        if not len(layers):
            return
        counts = load[layers].numpy()
        entropy = routing.load_entropy(counts)
        spread = (biases[layers].max(dim=1).values - biases[layers].min(dim=1).values).numpy()
        names = (layers + 1).tolist()
        events.write("routing", step=step, layers=names, max_violation=routing.max_violation(counts).tolist(),
                     entropy=entropy.tolist(), dead=routing.count_dead_experts(counts).tolist(),
                     bias_spread=spread.tolist())
        # in no checkpoint: after a resume experts have to be idle for as many records again
        before = np.zeros_like(counts, np.int64) if self._idle is None else self._idle
        idle = self._idle = np.where(counts == 0, before + 1, 0)
        alarms = dict(self._alarms(names, entropy, spread, idle))
        for kind, layer in sorted(alarms.keys() - self._active):
            events.write("alarm", step=step, kind=kind, layer=layer, text=alarms[kind, layer])
        self._active = set(alarms)

    def _alarms(self, layers: list[int], entropy: np.ndarray, spread: np.ndarray,
                idle: np.ndarray) -> Iterator[tuple[tuple[str, int], str]]:
        """Yield (kind, layer) and text of everything that is wrong now."""
        s = self._settings
        for i, layer in enumerate(layers):
            if entropy[i] < s.min_load_entropy:
                yield ("collapse", layer), (f"layer {layer}: the entropy of its expert load is "
                                            f"{entropy[i]:.3f} of that of an even load, "
                                            f"below guards.min_load_entropy = {s.min_load_entropy:g}")
            if spread[i] > s.max_bias_spread:
                yield ("router bias", layer), (f"layer {layer}: its selection biases lie {spread[i]:.3f} "
                                               "apart, more than guards.max_bias_spread = "
                                               f"{s.max_bias_spread:g}")
            dead = np.flatnonzero(idle[i] >= s.dead_after_records).tolist()
            if dead:
                more = f" and {len(dead) - MAX_SHOWN} others" if len(dead) > MAX_SHOWN else ""
                yield ("dead experts", layer), (f"layer {layer}: expert{'s' if len(dead) > 1 else ''} "
                                                f"{', '.join(map(str, dead[:MAX_SHOWN]))}{more} got no token "
                                                f"in {s.dead_after_records} routing records in a row")


class Guards:
    """The guards of one process."""

    def __init__(self, settings: GuardConfig, world: ParallelWorld, run: Path, faults: Sequence[Fault],
                 on_hang: Callable[[int, dict[str, list[int]]], None]) -> None:
        """Set them up; the watchdog's thread starts, and watches nothing yet.

        Args:
            settings: which of them watch, and how closely.
            world: this process's place.
            run: the run's folder.
            faults: what is to come on purpose, to see what the guards do about it.
            on_hang: see `Watchdog`.
        """
        self.step_guard = StepGuard(settings, world.is_main)
        """Refuses steps that must not be learned."""
        self.watchdog = Watchdog(run, world.rank, settings.hang_timeout_s, on_hang)
        """Ends a process whose step stands still."""
        self.sdc = SdcChecks(settings)
        """Finds hardware that gives wrong bits."""
        self.stragglers = Stragglers(settings)
        """Finds slow processes."""
        self.routing = RoutingMonitor(settings)
        """Finds routers that collapse."""
        self.faults = FaultInjector(faults, run, world.rank)
        """Does to the run what the others are there for."""

    def observe(self, step: int, expert_load: ExpertLoad, events: EventLog) -> None:
        """Look at a step (1-based) that was learned, where that is due; called by all processes together."""
        self.stragglers.report(step, events)
        if self.routing.is_due(step):
            self.routing.follow(step, expert_load.gather(), expert_load.biases(), events)
