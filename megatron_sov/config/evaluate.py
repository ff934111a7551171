"""Evaluation while a run trains, in the background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

EvalTask = Literal["ppl", "needle", "pairs", "lm"]


@dataclass(frozen=True)
class LmEvalConfig:
    """What `lm` of `evaluate.background.tasks` measures; each setting is that of an option of
    `megatron-sov eval lm` (docs/eval_lm.md)."""

    __pydantic_config__ = STRICT
    tasks: tuple[str, ...] = ()
    """Names of tasks and groups (`--tasks`)."""
    task_dirs: tuple[str, ...] = ()
    """Folders with tasks of your own, the first one first (`--task-dir`)."""
    data_dir: str = ""
    """What ${DATA} in a task's data files means (`--data-dir`); empty: nothing."""
    allow_task_code: bool = False
    """Let these folders run code (`--allow-task-code`)."""
    allow_download: bool = False
    """Fetch data of tasks that want it (`--allow-download`); lm-eval's own tasks do."""
    limit: int | None = None
    """Only the first items of each task, so many (`--limit`); null: all."""
    num_fewshot: int | None = None
    """Examples in front of each item (`--num-fewshot`); null: as the task says."""
    apply_chat_template: bool = False
    """Frame each prompt by the chat template (`--apply-chat-template`)."""
    mode: Literal["thinking", "no-thinking"] | None = None
    """Of a reasoning model (`--mode`); null: the task's."""
    samples: int | None = None
    """Answers to each item of tasks that sample several (`--samples`); null: the task's."""
    judge: tuple[str, ...] = ()
    """`key=value` settings of the reward that judges answers (`--judge`)."""
    batch_size: int | None = None
    """Answers that are written at a time (`--batch-size`); null: as many as `eval lm` takes by itself."""
    max_length_tokens: int | None = None
    """Longest sequence (`--max-length`); null: the model's."""
    max_gen_tokens: int | None = None
    """Longest answer, where it is to be shorter than the task's own (`--max-gen-tokens`)."""
    seed: int = 0
    """Of samples (`--seed`)."""
    workers: int = 1
    """Processes that judge answers (`--workers`); 0: one for each core."""

    def problems(self, is_asked: bool) -> list[str]:
        """Return one sentence for every broken rule; `is_asked`: whether anything measures these tasks."""
        least = {"limit": (self.limit, 1), "num_fewshot": (self.num_fewshot, 0), "samples": (self.samples, 1),
                 "batch_size": (self.batch_size, 1), "max_length_tokens": (self.max_length_tokens, 2),
                 "max_gen_tokens": (self.max_gen_tokens, 1), "seed": (self.seed, 0),
                 "workers": (self.workers, 0)}
        told = f"evaluate.lm.tasks = {list(self.tasks)}"
        rules = [
            (not is_asked or bool(self.tasks),
             f"{told} names none, and evaluate.background.tasks asks for lm"),
            (is_asked or not self.tasks,
             f"{told} are measured by nothing; add lm to evaluate.background.tasks"),
            (all(name.strip() and "," not in name for name in self.tasks),
             f"{told} must be names of tasks, each of its own, without commas"),
            (len(set(self.tasks)) == len(self.tasks), f"{told} names a task twice"),
            (self.mode is None or self.apply_chat_template,
             f"evaluate.lm.mode = {self.mode} is a setting of the chat template, and "
             "evaluate.lm.apply_chat_template = false frames no prompt by it"),
            (all("=" in setting for setting in self.judge),
             f"evaluate.lm.judge = {list(self.judge)} must have the form key=value"),
            *((value is None or value >= bound, f"evaluate.lm.{name} = {value} must be at least {bound}")
              for name, (value, bound) in least.items()),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True)
class BackgroundEvalConfig:
    """Jobs that measure a run's exports (`train.export_every_checkpoints`) beside training;
    they never hold it up."""

    __pydantic_config__ = STRICT
    tasks: tuple[EvalTask, ...] = ()
    """What is measured on every export: ppl (loss and bits per byte of each source on held-out documents),
    needle (the suite that the `needle` settings describe), pairs (the share of held-out pairs that is ranked
    right), lm (benchmarks, which the `evaluate.lm` settings name).  Empty: nothing."""
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
    lm: LmEvalConfig = LmEvalConfig()
    """Benchmarks of these evaluations."""

    def problems(self, exports: int) -> list[str]:
        """Return one sentence for every broken rule; `exports` is `train.export_every_checkpoints`."""
        return self.background.problems(exports) + self.lm.problems("lm" in self.background.tasks)
