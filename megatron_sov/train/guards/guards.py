"""Guards of a training run (settings `guards.*`): expert routing, slow processes and silent data corruption.

`step_guard.py` and `watchdog.py` have further guards.
"""

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
from megatron_sov.model.config import GuardConfig, RunConfig
from megatron_sov.runs.obs import routing
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.guards.fault_injection import Fault, FaultInjector
from megatron_sov.train.guards.step_guard import StepGuard
from megatron_sov.train.guards.watchdog import Watchdog

MAX_LISTED_RANKS = 64
"""Slowest ranks listed in a `compute_time` event."""
MAX_LISTED_EXPERTS = 8
"""Dead experts listed in an alarm."""

_waited_s = 0.0
"""Time this process has waited for collectives on CPU tensors."""
_is_wait_timed = False


class Guards:
    """A process's guards."""

    def __init__(self, config: RunConfig, world: ParallelWorld, run: Path, faults: Sequence[Fault],
                 on_hang: Callable[[int, dict[str, list[int]]], None]) -> None:
        """Build the guards and start the `Watchdog` thread, which calls `on_hang`."""
        settings = config.guards
        self.step_guard = StepGuard(settings, world.is_main)
        """Rejects steps with an unusual loss or gradient norm."""
        self.watchdog = Watchdog(run, world.rank, settings.hang_timeout_s, on_hang)
        """Ends the process if a step makes no progress."""
        self.sdc = SdcChecks(settings)
        """Finds silent data corruption (SDC): hardware that computes wrong bits."""
        self.stragglers = Stragglers(settings)
        """Finds slow processes."""
        self.routing = RoutingMonitor(config)
        """Finds layers whose routing collapses."""
        self.faults = FaultInjector(faults, run, world.rank)
        """Injects faults to test the other guards."""

    def check_step(self, step: int, expert_load: ExpertLoad, events: EventLog) -> None:
        """Run the checks due after learned step `step` (from 1). Collective."""
        self.stragglers.add_step(step, events)
        if self.routing.is_due(step):
            self.routing.record_load(step, expert_load.gather(), expert_load.biases(), events)


class SdcChecks:
    """Finds silent data corruption by comparing weight replicas and repeated computations."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings

    def is_probe_due(self, step: int) -> bool:
        """Return whether `step` (from 1) computes a micro-batch twice (`guards.probe_every_steps`)."""
        return self._settings.probe_every_steps > 0 and step % self._settings.probe_every_steps == 0

    def compare_repetition(self, step: int, model: LanguageModel, compute: Callable[[int], None],
                           events: EventLog) -> None:
        """Compute gradients twice and compare checksums. Collective.

        `compute(turn)` runs forward and backward passes of turn 0, then 1, without a sum over ranks. Raises
        `SilentCorruption` on every rank if a rank's checksums differ and `guards.on_sdc` is "exit".
        """
        checksums = []
        for turn in range(2):
            compute(turn)
            gradients = replica_checks.list_gradients(model)
            checksums.append([int(replica_checks.compute_checksum([gradient])) for gradient in gradients])
        self._report_ranks(step, replica_checks.gather_ranks_where(checksums[0] != checksums[1]),
                           "the same micro-batch gave other gradients when it was computed again", events)

    def compare_replicas(self, step: int, model: LanguageModel, events: EventLog) -> None:
        """Compare weight replicas before a checkpoint; raises like `compare_repetition`. Collective."""
        if self._settings.compare_replicas:
            self._report_ranks(step, replica_checks.find_differing_replicas(model),
                               "weights differ from those of their replicas", events)

    def _report_ranks(self, step: int, ranks: list[int], finding: str, events: EventLog) -> None:
        if not ranks:
            return
        hosts = gather_objects(platform.node())
        places = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        text = f"silent corruption after step {step}: {finding} ({places})"
        fields = {"step": step, "ranks": ranks, "hosts": [hosts[rank] for rank in ranks]}
        # `ranks` is equal on every rank: they raise together, and no rank waits in a collective
        if self._settings.on_sdc == "exit":
            events.write("sdc", **fields, text=text)
            raise SilentCorruption(f"{text}; nothing is saved from here on, "
                                   "test that machine before it is used again")
        if dist.get_rank() == 0:
            warn(text, events.write, "sdc", **fields)


class Stragglers:
    """Averages each process's computing time and reports processes far above the median.

    The step time does not reveal a slow process, because the whole world waits for it.
    """

    def __init__(self, settings: GuardConfig) -> None:
        self._every_steps, self._ratio = settings.straggler_every_steps, settings.straggler_ratio
        self.clock = ComputeClock() if self._every_steps else None
        self._total_s, self._num_steps = 0.0, 0

    def add_step(self, step: int, events: EventLog) -> None:
        """Add the time of `step` (from 1), and compare ranks every `guards.straggler_every_steps` steps."""
        if self.clock is None:
            return
        self._total_s += self.clock.seconds()
        self._num_steps += 1
        if step % self._every_steps:
            return
        compute_s = collectives.gather_numbers(self._total_s / self._num_steps)
        self._total_s, self._num_steps = 0.0, 0
        # the lower median: with two processes, the mean of both would hide the slower process
        median_s = statistics.median_low(compute_s)
        slowest = sorted(range(len(compute_s)), key=lambda rank: -compute_s[rank])[:MAX_LISTED_RANKS]
        slow = [rank for rank in slowest if compute_s[rank] > self._ratio * median_s]
        events.write("compute_time", step=step, median_s=median_s,
                     seconds={str(rank): compute_s[rank] for rank in sorted(slowest)}, slow=slow)
        for rank in slow:
            events.write("alarm", step=step, kind="slow process", rank=rank,
                         text=f"rank {rank} computes {compute_s[rank]:.3g} s a step, the median process "
                              f"{median_s:.3g} s")


class ComputeClock:
    """Times forward and backward passes until gradients are summed over data-parallel ranks.

    On a CPU, waits for tensor-, expert-, context- and pipeline-parallel collectives are subtracted. On a GPU,
    the host does not wait: the device's time includes these waits, so a model replica's ranks have one time.
    """

    def __init__(self) -> None:
        self._on_gpu = on_gpu()
        self._start: Any = None
        self._stop: Any = None
        if not self._on_gpu:
            _time_waits()

    def start(self) -> None:
        self._stop = None
        self._start = self._read_time()

    def stop(self) -> None:
        self._stop = self._read_time()

    def seconds(self) -> float:
        """Return seconds between `start` and `stop`, after waiting until the device reaches `stop`."""
        if self._on_gpu:
            self._stop.synchronize()
            return float(self._start.elapsed_time(self._stop)) / 1e3
        return float(self._stop - self._start)

    def _read_time(self) -> Any:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        # this clock stops during waits for collectives
        return time.perf_counter() - _waited_s


def _time_waits() -> None:
    """Patch `dist.Work.wait`, which ends torch's collectives on CPU tensors, to add to `_waited_s`."""
    global _is_wait_timed
    # once per process: a second patch would count every wait twice
    if _is_wait_timed:
        return
    _is_wait_timed = True
    work_class: Any = dist.Work
    wait = work_class.wait

    def timed_wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        global _waited_s
        start_s = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            _waited_s += time.perf_counter() - start_s

    work_class.wait = timed_wait


class RoutingMonitor:
    """Records routing figures for MoE layers; a lasting alarm is raised once."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._settings = config, config.guards
        self._idle: np.ndarray | None = None
        """[layers, experts]: consecutive records in which an expert got no token; not in checkpoints."""
        self._active: set[tuple[str, int]] = set()

    def is_due(self, step: int) -> bool:
        return self._settings.routing_every_steps > 0 and step % self._settings.routing_every_steps == 0

    def record_load(self, step: int, load: torch.Tensor, biases: torch.Tensor, events: EventLog) -> None:
        """Record routing figures and new alarms after `step` (from 1).

        `load` [layers, experts] has token counts, 0 in dense layers; `biases` [layers, experts] has selection
        biases.
        """
        layers = torch.nonzero(load.sum(dim=1) > 0).flatten()
        if not len(layers):
            return
        counts = load[layers].numpy()
        entropy = routing.load_entropy(counts)
        spread = (biases[layers].max(dim=1).values - biases[layers].min(dim=1).values).numpy()
        layer_numbers = (layers + 1).tolist()
        events.write("routing", step=step, layers=layer_numbers,
                     max_violation=routing.max_violation(counts).tolist(), entropy=entropy.tolist(),
                     dead=routing.count_dead_experts(counts).tolist(), bias_spread=spread.tolist())
        previous_idle = np.zeros_like(counts, np.int64) if self._idle is None else self._idle
        self._idle = np.where(counts == 0, previous_idle + 1, 0)
        alarms = dict(self._iter_alarms(layer_numbers, entropy, spread, self._idle))
        alarms |= dict(self._iter_overloads(layers.tolist(), counts))
        for kind, layer in sorted(alarms.keys() - self._active):
            events.write("alarm", step=step, kind=kind, layer=layer, text=alarms[kind, layer])
        self._active = set(alarms)

    def _iter_alarms(self, layers: list[int], entropy: np.ndarray, spread: np.ndarray,
                     idle: np.ndarray) -> Iterator[tuple[tuple[str, int], str]]:
        """Yield (kind, layer) and text for each alarm."""
        settings = self._settings
        for i, layer in enumerate(layers):
            if entropy[i] < settings.min_load_entropy:
                yield ("collapse", layer), (f"layer {layer}: the entropy of its expert load is "
                                            f"{entropy[i]:.3f} of that of an even load, "
                                            f"below guards.min_load_entropy = {settings.min_load_entropy:g}")
            if spread[i] > settings.max_bias_spread:
                yield ("router bias", layer), (f"layer {layer}: its selection biases lie {spread[i]:.3f} "
                                               "apart, more than guards.max_bias_spread = "
                                               f"{settings.max_bias_spread:g}")
            dead = np.flatnonzero(idle[i] >= settings.dead_after_records).tolist()
            if dead:
                plural = "s" if len(dead) > 1 else ""
                names = ", ".join(map(str, dead[:MAX_LISTED_EXPERTS]))
                if len(dead) > MAX_LISTED_EXPERTS:
                    names += f" and {len(dead) - MAX_LISTED_EXPERTS} others"
                yield ("dead experts", layer), (f"layer {layer}: expert{plural} {names} got no token "
                                                f"in {settings.dead_after_records} routing records in a row")

    def _iter_overloads(self, layers: list[int], counts: np.ndarray) -> Iterator[tuple[tuple[str, int], str]]:
        """Yield an alarm for each pipeline stage with an expert process above `gpu.expert_imbalance`."""
        parallel, num_layers = self._config.parallel, self._config.model.num_layers
        stages = routing.list_stage_rows(parallel, num_layers, layers) if parallel.ep > 1 else []
        for rows in stages:
            load = routing.compute_process_load(counts[rows], parallel.ep) if rows else 1.0
            if load > self._config.gpu.expert_imbalance:
                first, last = layers[rows[0]] + 1, layers[rows[-1]] + 1
                yield ("expert memory", first), (
                    f"layers {first} to {last}: the busiest expert process gets {load:.2f} times the mean "
                    f"tokens, and gpu.expert_imbalance = {self._config.gpu.expert_imbalance:g}: GPU memory "
                    "may not suffice; set gpu.expert_spill=1.2")
