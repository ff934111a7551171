"""Which of a run's checkpoints writes the responses of a round of reinforcement learning.  No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs import checkpoints


@dataclass(frozen=True)
class Policy:
    """Weights that responses are written by."""

    path: Path
    """The checkpoint."""
    step: int
    """Optimizer steps behind it, of the run; 0: the one that it starts from."""
    sha256: str
    """Hash of its manifest, by which responses are known to be its."""


def policy_of_round(run: Path, start: Path, number: int, rollout: RolloutConfig) -> Policy | None:
    """Return the newest policy, where it may write a round; None: it is not trained yet.

    A policy is the checkpoint behind the last step of a round.  Newer ones than a round needs are used as
    well: what is left of an old round is written by whatever policy there is.

    Args:
        run: the folder of `rl train`, which may not be there yet.
        start: the checkpoint that it starts from.
        number: of the round, from 1.
        rollout: its rounds.
    """
    folder = run / checkpoints.CHECKPOINTS_OF_A_RUN
    newest = checkpoints.latest(folder)
    while newest is not None and checkpoints.step_of(newest) % rollout.steps_per_round:
        newest = checkpoints.latest_not_after(folder, checkpoints.step_of(newest) - 1)
    path, step = (start, 0) if newest is None else (newest, checkpoints.step_of(newest))
    if step // rollout.steps_per_round < number - 1 - rollout.max_staleness:
        return None
    return Policy(path, step, manifest_sha256(path))
