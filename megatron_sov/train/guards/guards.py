"""All that watches a run, in one place: each guard has a file of its own, and its settings in `guards.*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sov.config import GuardConfig
from megatron_sov.mcore.model.expert_load import ExpertLoad
from megatron_sov.mcore.parallel.world import World
from megatron_sov.obs.events import EventLog
from megatron_sov.train.guards.fault_injection import Fault, Faults
from megatron_sov.train.guards.routing_monitor import RoutingMonitor
from megatron_sov.train.guards.sdc import SdcChecks
from megatron_sov.train.guards.step_guard import StepGuard
from megatron_sov.train.guards.stragglers import Stragglers
from megatron_sov.train.guards.watchdog import Watchdog


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
