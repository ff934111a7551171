"""Evaluation while a run trains, in the background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from megatron_sov.settings import AboveZero, AtLeastOne, NotNegativeInt

EvalTask = Literal["ppl", "needle", "pairs", "lm"]


@dataclass(frozen=True)
class LmEvalConfig:
    """What `lm` of `evaluate.background.tasks` measures; each setting is that of an option of
    `megatron-sov eval lm` (docs/eval_lm.md)."""

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
    limit: AtLeastOne | None = None
    """Only the first items of each task, so many (`--limit`); null: all."""
    num_fewshot: NotNegativeInt | None = None
    """Examples in front of each item (`--num-fewshot`); null: as the task says."""
    apply_chat_template: bool = False
    """Frame each prompt by the chat template (`--apply-chat-template`)."""
    mode: Literal["thinking", "no-thinking"] | None = None
    """Of a reasoning model (`--mode`); null: the task's."""
    samples: AtLeastOne | None = None
    """Answers to each item of tasks that sample several (`--samples`); null: the task's."""
    judge: tuple[str, ...] = ()
    """`key=value` settings of the reward that judges answers (`--judge`)."""
    batch_size: AtLeastOne | None = None
    """Answers that are written at a time (`--batch-size`); null: as many as `eval lm` takes by itself."""
    max_length_tokens: Annotated[int, Ge(2)] | None = None
    """Longest sequence (`--max-length`); null: the model's."""
    max_gen_tokens: AtLeastOne | None = None
    """Longest answer, where it is to be shorter than the task's own (`--max-gen-tokens`)."""
    seed: NotNegativeInt = 0
    """Of samples (`--seed`)."""
    workers: NotNegativeInt = 1
    """Processes that judge answers (`--workers`); 0: one for each core."""


@dataclass(frozen=True)
class BackgroundEvalConfig:
    """Jobs that measure a run's exports (`train.export_every_checkpoints`) beside training;
    they never hold it up."""

    tasks: tuple[EvalTask, ...] = ()
    """What is measured on every export: ppl (loss and bits per byte of each source on held-out documents),
    needle (the suite that the `needle` settings describe), pairs (the share of held-out pairs that is ranked
    right), lm (benchmarks, which the `evaluate.lm` settings name).  Empty: nothing."""
    where: Literal["local", "slurm"] = "local"
    """local: a process on the machine of rank 0, at the lowest priority and without a GPU;
    slurm: a job of its own."""
    cluster: str = ""
    """slurm: profile of the jobs, as for `megatron-sov submit --cluster`."""
    timeout_s: AboveZero = 3600.0
    """Seconds after which a task without a result is given up; a job's time in the queue counts."""
    max_waiting: AtLeastOne = 2
    """Exports that wait for their tasks at most, and jobs at a time; of more the oldest is left out."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a run."""

    background: BackgroundEvalConfig = BackgroundEvalConfig()
    """Evaluation beside training."""
    lm: LmEvalConfig = LmEvalConfig()
    """Benchmarks of these evaluations."""
