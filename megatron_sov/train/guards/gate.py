"""What a stage has to pass: a gate that the loop asks after every step, and one that judges the last
checkpoint when all processes have ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.folder import RunEvents, RunFolder
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.runs.obs.events import EventLog


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
    def world(self) -> ParallelWorld:
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


@dataclass(frozen=True)
class EndVerdict:
    """What a gate found of a stage's last checkpoint."""

    failure: str | None
    """What did not pass, in one sentence and lines below it; None: it has passed."""
    completion: dict[str, Any]
    """What joins the completion manifest."""


class EndGate(Protocol):
    """Judges a stage's last checkpoint; outside of the processes that train, which hold its memory."""

    @property
    def name(self) -> str:
        """Of its verdict in the completion manifest."""
        ...

    def begin(self) -> None:
        """Do before the first step what can be done then; mistakes are met here and not days later.  Called
        by the launcher, or by every process under torchrun or Slurm."""
        ...

    def judge(self, checkpoint: Path) -> EndVerdict | None:
        """Return what was found; None on other processes than the first."""
        ...


def conclude(folder: RunFolder, gate: EndGate | None) -> None:
    """Have the last checkpoint judged, where one waits for that; then the stage is complete, or failed."""
    held = folder.held()
    if gate is None or held is None:
        return
    verdict = gate.judge(folder.path / held["checkpoint"])
    if verdict is None or not is_first_rank():
        return
    if verdict.failure is None:
        folder.complete({**held, **verdict.completion})
    else:
        RunEvents(folder.path).add("gate_failed", step=held["step"], text=verdict.failure)
        folder.mark_gate_failed(verdict.failure)
    # last: a crash before this line has the checkpoint judged again, or finds the verdict on the disk
    folder.release()
