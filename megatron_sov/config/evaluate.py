"""Evaluation while a run trains, beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

Judge = Literal["ppl", "needle"]


@dataclass(frozen=True)
class BesideConfig:
    """Jobs that judge a run's exports (`train.export_every_checkpoints`) beside training; they never hold it up."""

    __pydantic_config__ = STRICT
    judges: tuple[Judge, ...] = ()
    """What judges every export: ppl (loss and bits per byte of each source on held-out documents), needle (the suite that the
    `needle` settings describe).  Empty: nothing."""
    where: Literal["local", "slurm"] = "local"
    """local: a process on the machine of rank 0, at the lowest priority and without a GPU; slurm: a job of its own."""
    cluster: str = ""
    """slurm: profile of the jobs, as for `megatron-sov submit --cluster`."""
    timeout_s: float = 3600.0
    """Seconds after which a judge without a result is given up; a job's time in the queue counts."""
    max_waiting: int = 2
    """Exports that wait for their judges at most, and jobs at a time; of more the oldest is left out."""

    def problems(self, exports: int) -> list[str]:
        """Return one sentence for every broken rule; `exports` is `train.export_every_checkpoints`."""
        rules = [
            (not self.judges or exports > 0,
             f"evaluate.beside.judges = {list(self.judges)} judge exports, and train.export_every_checkpoints = 0 makes none"),
            (len(set(self.judges)) == len(self.judges), f"evaluate.beside.judges = {list(self.judges)} names a judge twice"),
            (0 < self.timeout_s < math.inf, f"evaluate.beside.timeout_s = {self.timeout_s} must be a positive number"),
            (self.max_waiting > 0, f"evaluate.beside.max_waiting = {self.max_waiting} must be positive"),
            (self.where == "local" or bool(self.cluster), "evaluate.beside.where = slurm needs evaluate.beside.cluster"),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a run."""

    __pydantic_config__ = STRICT
    beside: BesideConfig = BesideConfig()
    """Evaluation beside training."""
