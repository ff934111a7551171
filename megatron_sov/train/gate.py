"""What may end a stage before its last step: a gate that the loop asks after every step."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_sov.config import RunConfig
from megatron_sov.mcore.decode.forward_only import ForwardModel
from megatron_sov.mcore.parallel.world import World
from megatron_sov.obs.events import EventLog


class GateView(Protocol):
    """What a gate sees of the run that it judges: enough to measure the model and to
    record what was found."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def finished(self) -> bool:
        """Whether there is no more to train."""
        ...

    @property
    def policy(self) -> ForwardModel:
        """The model, forward only."""
        ...

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        ...

    @property
    def world(self) -> World:
        """This process's place."""
        ...

    @property
    def events(self) -> EventLog:
        """The run's events; dropped on other processes than rank 0."""
        ...


class Gate(Protocol):
    """Judges the model while it trains; a stage with a gate is complete when it has
    passed, and not before."""

    passed: bool
    """Whether the stage may end."""

    def begin(self, run: GateView) -> None:
        """Judge the model before the first step of a new run; called by all processes together."""
        ...

    def check(self, run: GateView) -> None:
        """Judge the model if a check is due after this step; called by all processes together."""
        ...

    def failure(self) -> str:
        """Return what did not pass, in one sentence and lines below it."""
        ...

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...
