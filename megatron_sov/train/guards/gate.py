"""Protocols of gates: checks that a stage must pass, during training or on its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.model.config import RunConfig
from megatron_sov.runs.obs.events import EventLog

if TYPE_CHECKING:
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.parallel.world import ParallelWorld


class GateView(Protocol):
    """Part of the trainer that gates and hooks use: enough to measure the model and record results."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def finished(self) -> bool:
        """Whether the last step is done or the gate has passed."""

    @property
    def policy(self) -> ForwardModel:
        """The model, forward only."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def world(self) -> ParallelWorld:
        """Rank and groups of this process."""

    @property
    def events(self) -> EventLog:
        """Event log of the run; drops events on ranks other than 0."""


class Gate(Protocol):
    """Judges the model during training; the stage is complete only after the gate has passed."""

    passed: bool
    """Whether the stage may end."""

    def begin(self, run: GateView) -> None:
        """Judge the model before the first step of a new run. Collective."""

    def check(self, run: GateView) -> None:
        """Judge the model if a check is due after this step. Collective."""

    def failure(self) -> str:
        """Describe the failure: one sentence, and lines below it."""

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""


@dataclass(frozen=True)
class EndVerdict:
    """Verdict on the last checkpoint of a stage."""

    failure: str | None
    """Description of the failure: one sentence, and lines below it; None: passed."""
    completion: dict[str, Any]
    """Fields of the completion manifest."""


class EndGate(Protocol):
    """Judges the last checkpoint of a stage after the training processes have ended."""

    @property
    def name(self) -> str:
        """Key of the verdict in the completion manifest."""

    def begin(self) -> None:
        """Prepare before the first step, so that mistakes show early. Called by the launcher, or by every
        process under torchrun or Slurm."""

    def judge(self, checkpoint: Path) -> EndVerdict | None:
        """Return the verdict; None on processes other than the first."""
