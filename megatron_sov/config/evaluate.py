"""Evaluation while a run trains, in the background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

EvalTask = Literal["ppl", "needle", "pairs"]


@dataclass(frozen=True)
class BackgroundEvalConfig:
    """Jobs that measure a run's exports (`train.export_every_checkpoints`) beside training;
    they never hold it up."""

    __pydantic_config__ = STRICT
    tasks: tuple[EvalTask, ...] = ()
    """What is measured on every export: ppl (loss and bits per byte of each source on held-out documents),
    needle (the suite that the `needle` settings describe), pairs (the share of held-out pairs that is ranked
    right).  Empty: nothing."""
    where: Literal["local", "slurm"] = "local"
    """local: a process on the machine of rank 0, at the lowest priority and without a GPU;
    slurm: a job of its own."""
    cluster: str = ""
    """slurm: profile of the jobs, as for `megatron-sov submit --cluster`."""
    timeout_s: float = 3600.0
    """Seconds after which a task without a result is given up; a job's time in the queue counts."""
    max_waiting: int = 2
    """Exports that wait for their tasks at most, and jobs at a time; of more the oldest is left out."""

    def problems(self, exports: int) -> list[str]:
        """Return one sentence for every broken rule; `exports` is `train.export_every_checkpoints`."""
        rules = [
            (not self.tasks or exports > 0, f"evaluate.background.tasks = {list(self.tasks)} measure "
                                            "exports, and train.export_every_checkpoints = 0 makes none"),
            (len(set(self.tasks)) == len(self.tasks),
             f"evaluate.background.tasks = {list(self.tasks)} names a task twice"),
            (0 < self.timeout_s < math.inf,
             f"evaluate.background.timeout_s = {self.timeout_s} must be a positive number"),
            (self.max_waiting > 0, f"evaluate.background.max_waiting = {self.max_waiting} must be positive"),
            (self.where == "local" or bool(self.cluster),
             "evaluate.background.where = slurm needs evaluate.background.cluster"),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a run."""

    __pydantic_config__ = STRICT
    background: BackgroundEvalConfig = BackgroundEvalConfig()
    """Evaluation beside training."""
