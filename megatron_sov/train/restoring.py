"""Finding the checkpoint to go on from, at a start and when weights are taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.mcore.checkpoint import load
from megatron_sov.engine.mcore.parallel.world import ParallelWorld, on_main
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, EventLog

# Plain values of a training run: how far it is, and what a step gave.

@dataclass
class TrainState:
    """The loop's own counters; in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens consumed, padding not counted."""
    wall_s: float = 0.0
    """Seconds that the run has worked, over all its restarts."""
    trained_tokens: int = 0
    """Longest samples that the weights have learned from, in tokens: here, or in the runs before."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Total loss: coefficients times normalised terms."""
    losses: dict[str, float]
    """Term -> normalised loss."""
    losses_by_source: dict[str, float]
    """Source -> mean loss of its targets in this batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of the step."""
    num_tokens: int
    """Tokens of the batch."""
    phase: str
    """Phase of the curriculum."""
    padding_share: float
    """Part of the batch that was padding."""
    seq_len: int
    """Tokens of a sample."""
    seconds: float = field(default=0.0)
    """Wall time of the step."""
    meters: dict[str, float] = field(default_factory=dict)
    """Meter of the objective -> its mean over the batch."""


ANY_STEP = 2**62


def newest_sound(folder: RunFolder, place: ParallelWorld, not_after: int = ANY_STEP) -> Path | None:
    """Return the newest sound checkpoint of a run up to a step, or None; called by all processes together.

    A damaged one is set aside, loudly, for the one before.
    """
    # one process looks: on a network file system the others may still see an older listing
    while ((newest := on_main(place, lambda: checkpoints.latest_not_after(folder.checkpoints, not_after)))
           is not None):
        problem = load.damage(newest)
        if problem is None:
            return Path(newest)
        on_main(place, partial(_set_aside, folder, newest, problem))
    return None


def _set_aside(folder: RunFolder, damaged: Path, problem: str) -> None:
    aside = checkpoints.set_aside(damaged)
    text = (f"{problem}; {damaged.name} is renamed to {aside.name}, and the run goes on from the "
            "checkpoint before it")
    events = EventLog(folder.path / EVENTS)
    warn(text, events.write, step=checkpoints.step_of(damaged))
    events.write("damaged_checkpoint", path=f"{folder.checkpoints.name}/{damaged.name}", reason=problem,
                 renamed_to=f"{folder.checkpoints.name}/{aside.name}")
    events.close()


def refuse_other_base(newest: Path, start_from: Path) -> None:
    """Raise `UserError` where an adapter's run would go on beside other frozen weights."""
    base = checkpoints.adapter_base(newest)
    if base is not None:
        start = checkpoints.adapter_base(start_from) or checkpoints.AdapterBase.of(start_from)
        if start.sha256 != base.sha256:
            raise UserError(f"--from {start_from}: is another model than {base.path}, beside which {newest} "
                            "was trained; resume with that, or start a new --run")
