"""Options of `eval lm`. No torch and no lm_eval here."""

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
    """Folders with tasks and their data."""

    folders: Annotated[tuple[Path, ...], Flag("--task-dir", "DIR")] = ()
    """Folder with tasks in lm-eval's format; may be repeated, and the first folder with a task wins."""
    data_dir: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder for ${DATA} in the tasks' data files."""
    allow_code: Annotated[bool, Flag("--allow-task-code")] = False
    """Let tasks in --task-dir run code: !function, metrics, data sets."""
    allow_download: bool = False
    """Let tasks fetch data, as lm-eval's own tasks do."""


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings(RankOptions):
    """Settings of an evaluation apart from model and tasks."""

    output: Annotated[Path, Flag(value="OUT.json")]
    """Result file; the items go to OUT.items.jsonl."""
    sources: TaskSources = field(default_factory=TaskSources)
    """Folders with tasks and their data."""
    num_items: Annotated[AtLeastOne | None, Flag("--limit")] = None
    """Only the first N items per task."""
    samples: AtLeastOne | None = None
    """Answers per item for tasks with a reward (default: the task's)."""
    judge: Annotated[tuple[str, ...], Flag(value="key=value")] = ()
    """Reward setting, e.g. endpoint=http://localhost:8000/v1; may be repeated."""
    mode: Annotated[ThinkingMode | None, requires_field("chat_template")] = None
    """Mode for a reasoning model (default: the task's)."""
    engine: ChosenEngine = None
    workers: NotNegativeInt = 0
    """Processes for rewards (default: one for each core)."""
    cache: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder for answers, which evaluations may share (default: OUT.cache)."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the scores to this run's events, for its report."""
    num_fewshot: NotNegativeInt | None = None
    """Examples before each item (default: the task's)."""
    chat_template: Annotated[bool, Flag("--apply-chat-template")] = False
    """Format each prompt with the chat template."""
    batch_size: BatchSize = Batching.batch_size
    max_length_tokens: Annotated[Annotated[int, Ge(2)] | None, Flag("--max-length")] = None
    """Context length in tokens (default: the model's)."""
    max_gen_tokens: Annotated[AtLeastOne | None, Flag("--max-new-tokens")] = None
    """Longest answer in tokens, if shorter than the task's limit."""
    seed: Annotated[NotNegativeInt, Flag(value="S")] = 0
    """Seed for samples."""

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output.with_name(f"{self.output.name.removesuffix('.json')}.cache")
