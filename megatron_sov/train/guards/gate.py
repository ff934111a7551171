"""Protocols for gates: checks that a stage must pass during training."""

from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.model.config import RunConfig
from megatron_sov.runs.obs.events import EventLog

if TYPE_CHECKING:
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.parallel.world import ParallelWorld


class GateView(Protocol):
    """The `Trainer` interface with which gates and hooks measure the model and record results."""

    @property
    def step(self) -> int:
        """Completed optimizer steps."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""

    @property
    def finished(self) -> bool:
        """Whether the last step is done or the gate has passed."""

    @property
    def policy(self) -> "ForwardModel":
        """The model, forward only."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def world(self) -> "ParallelWorld":
        """This process's rank and groups."""

    @property
    def events(self) -> EventLog:
        """The run's event log, which drops events on ranks above 0."""


class Gate(Protocol):
    """Judges the model during training; the stage is complete only after `passed` becomes True."""

    passed: bool
    """Whether the stage may end."""

    def begin(self, run: GateView) -> None:
        """Judge the model before a new run's first step. Collective."""

    def check(self, run: GateView) -> None:
        """Judge the model if a check is due after the last step. Collective."""

    def failure(self) -> str:
        """Describe the failure in a sentence with detail lines below."""

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result that `state` returned."""
