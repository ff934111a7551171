"""What an evaluation can be told.  No torch and no lm_eval here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from megatron_sov.base.settings import AtLeastOne, Flag, NotNegativeInt, requires_field
from megatron_sov.infer.engine import ChosenEngine
from megatron_sov.infer.request import Batching, BatchSize, RankOptions

ThinkingMode = Literal["thinking", "no-thinking"]


@dataclass(frozen=True)
class TaskSources:
    """Where tasks and their data come from."""

    folders: Annotated[tuple[Path, ...], Flag("--task-dir", "DIR")] = ()
    """Folder with tasks of your own, in lm-eval's form, the first one first; may be repeated."""
    data_dir: Annotated[Path | None, Flag(value="DIR")] = None
    """What ${DATA} in a task's data files means."""
    allow_code: Annotated[bool, Flag("--allow-task-code")] = False
    """Let --task-dir run code: !function, metrics of its own."""
    allow_download: bool = False
    """Fetch data of tasks that want it; lm-eval's own tasks do."""


@dataclass(frozen=True, kw_only=True)
class Settings(RankOptions):
    """What an evaluation depends on beside the model and the names of its tasks."""

    output: Annotated[Path, Flag(value="OUT.json")]
    """Results to write; the items come to lie beside it as OUT.items.jsonl."""
    sources: TaskSources = field(default_factory=TaskSources)
    """Where tasks and their data come from."""
    num_items: Annotated[AtLeastOne | None, Flag("--limit")] = None
    """Only the first N items (of each task)."""
    samples: AtLeastOne | None = None
    """Answers to each item of tasks that a reward judges (default: the task's)."""
    judge: Annotated[tuple[str, ...], Flag(value="key=value")] = ()
    """A setting of the reward that judges, e.g. endpoint=http://localhost:8000/v1; may be repeated."""
    mode: Annotated[ThinkingMode | None, requires_field("chat_template")] = None
    """Of a reasoning model (default: the task's)."""
    engine: ChosenEngine = None
    workers: NotNegativeInt = 0
    """Processes that judge (default: one for each core)."""
    cache: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder of answers, which evaluations may share (default: OUT.cache)."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""
    num_fewshot: NotNegativeInt | None = None
    """Examples in front of each item (default: as the task says)."""
    chat_template: Annotated[bool, Flag("--apply-chat-template")] = False
    """Frame each prompt by the chat template."""
    batch_size: BatchSize = Batching.batch_size
    max_length_tokens: Annotated[Annotated[int, Ge(2)] | None, Flag("--max-length")] = None
    """Longest sequence, in tokens (default: the model's)."""
    max_gen_tokens: Annotated[AtLeastOne | None, Flag("--max-new-tokens")] = None
    """Longest answer, where it is to be shorter than the task's own."""
    seed: Annotated[NotNegativeInt, Flag(value="S")] = 0
    """Of samples."""

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output.with_name(f"{self.output.name.removesuffix('.json')}.cache")
