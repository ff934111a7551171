"""All that watches a run, in one place: each guard has a file of its own, and its settings in `guards.*`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_sov.config import GuardConfig
from megatron_sov.mcore.model.expert_load import ExpertLoad
from megatron_sov.mcore.parallel.world import World
from megatron_sov.obs import routing
from megatron_sov.obs.events import EventLog
from megatron_sov.train.guards.fault_injection import Fault, Faults
from megatron_sov.train.guards.sdc import SdcChecks
from megatron_sov.train.guards.step_guard import StepGuard
from megatron_sov.train.guards.stragglers import Stragglers
from megatron_sov.train.guards.watchdog import Watchdog

MAX_SHOWN = 8
"""Experts that an alarm names."""


# The watch over expert routing: records of every layer, and alarms when one collapses.


class RoutingMonitor:
    """Records the figures of each routed layer now and then; an alarm comes once,
    and again only when it had passed."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self._idle: np.ndarray | None = None  # records in a row without a token, [layers, experts]
        self._active: set[tuple[str, int]] = set()

    def is_due(self, step: int) -> bool:
        """Return whether a step's routing (1-based) is recorded."""
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
                     entropy=entropy.tolist(), dead=routing.num_dead(counts).tolist(),
                     bias_spread=spread.tolist())
        idle = np.where(counts == 0, 1, 0) if self._idle is None else (self._idle + 1) * (counts == 0)
        self._idle = idle
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

    def __init__(self, settings: GuardConfig, world: World, run: Path, faults: Sequence[Fault],
                 on_hang: Callable[[int, dict[str, list[int]]], None], *,
                 losses_compare: bool = True) -> None:
        """Set them up; the watchdog's thread starts, and watches nothing yet.

        Args:
            settings: which of them watch, and how closely.
            world: this process's place.
            run: the run's folder.
            faults: what is to come on purpose, to see what the guards do about it.
            on_hang: see `Watchdog`.
            losses_compare: see `StepGuard`.
        """
        self.step_guard = StepGuard(settings, world.is_main, losses_compare=losses_compare)
        """Refuses steps that must not be learned."""
        self.watchdog = Watchdog(run, world.rank, settings.hang_timeout_s, on_hang)
        """Ends a process whose step stands still."""
        self.sdc = SdcChecks(settings)
        """Finds hardware that gives wrong bits."""
        self.stragglers = Stragglers(settings)
        """Finds slow processes."""
        self.routing = RoutingMonitor(settings)
        """Finds routers that collapse."""
        self.faults = Faults(faults, run, world.rank)
        """Does to the run what the others are there for."""

    def observe(self, step: int, expert_load: ExpertLoad, events: EventLog) -> None:
        """Look at a step (1-based) that was learned, where that is due; called by all processes together."""
        self.stragglers.report(step, events)
        if self.routing.is_due(step):
            self.routing.follow(step, expert_load.gather(), expert_load.biases(), events)
