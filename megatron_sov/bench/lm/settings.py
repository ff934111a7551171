"""What an evaluation can be told.  No torch and no lm_eval here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from megatron_sov.base.settings import AtLeastOne, Flag, NotNegativeInt, only_with
from megatron_sov.bench.lm.tasks import TaskSources
from megatron_sov.infer.engine import ChosenEngine
from megatron_sov.infer.request import Batching, BatchSize, RankOptions

ThinkingMode = Literal["thinking", "no-thinking"]
ENDPOINTS, DEFAULT_KEY_ENV = "endpoints", "OPENAI_API_KEY"
OTHER_MODEL = ("name another --cache for its answers, or pass --same-model if only the engine changed; then "
               "the kept answers are used")
"""What a user may do whose endpoint does not say what it said before."""


@dataclass(frozen=True)
class EndpointModel:
    """A model behind an OpenAI-compatible endpoint."""

    model: Annotated[str, Flag(value="NAME", group=ENDPOINTS)] = ""
    """Name that the endpoint knows it by."""
    key_env: Annotated[str, Flag(value="NAME", group=ENDPOINTS)] = DEFAULT_KEY_ENV
    """Variable of the environment with the key; none is sent where it is not set."""
    same_model: Annotated[bool, Flag(group=ENDPOINTS)] = False
    """The endpoint's model is the one whose answers are kept, though it answers fixed questions otherwise."""


@dataclass(frozen=True)
class EndpointSettings(EndpointModel):
    """How an OpenAI-compatible endpoint is asked."""

    tokenizer: Annotated[Path | None, Flag(value="DIR", group=ENDPOINTS)] = None
    """Its model's tokenizer, without which likelihoods cannot be asked for."""
    concurrent: Annotated[AtLeastOne, Flag(group=ENDPOINTS)] = 16
    """Requests under way at a time."""

@dataclass(frozen=True, kw_only=True)
class JudgedSettings(RankOptions):
    """Which items of tasks are asked, of what, and how what comes back is judged."""

    num_items: Annotated[AtLeastOne | None, Flag("--limit")] = None
    """Only the first N items (of each task)."""
    samples: AtLeastOne | None = None
    """Answers to each item of tasks that sample several, or its episodes (default: the task's)."""
    judge: Annotated[tuple[str, ...], Flag(value="key=value")] = ()
    """A setting of the reward that judges, e.g. endpoint=http://localhost:8000/v1; may be repeated."""
    mode: ThinkingMode | None = None
    """Of a reasoning model (default: the task's)."""
    engine: ChosenEngine = None
    workers: NotNegativeInt = 0
    """Processes that judge (default: one for each core)."""


@dataclass(frozen=True, kw_only=True)
class Settings(JudgedSettings):
    """What an evaluation depends on beside the model and the names of its tasks."""

    output: Annotated[Path, Flag(value="OUT.json")]
    """Results to write; the items come to lie beside it as OUT.items.jsonl."""
    sources: TaskSources = field(default_factory=TaskSources)
    """Where tasks and their data come from."""
    cache: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder of answers, which evaluations may share (default: OUT.cache)."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""
    num_fewshot: NotNegativeInt | None = None
    """Examples in front of each item (default: as the task says)."""
    mode: Annotated[ThinkingMode | None, only_with("chat_template")] = None
    chat_template: Annotated[bool, Flag("--apply-chat-template")] = False
    """Frame each prompt by the chat template."""
    batch_size: BatchSize = Batching.batch_size
    max_length_tokens: Annotated[Annotated[int, Ge(2)] | None, Flag("--max-length")] = None
    """Longest sequence, in tokens (default: the model's)."""
    max_gen_tokens: Annotated[AtLeastOne | None, Flag("--max-new-tokens")] = None
    """Longest answer, where it is to be shorter than the task's own."""
    seed: Annotated[NotNegativeInt, Flag(value="S")] = 0
    """Of samples."""
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    """Used where the target is an address."""

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output.with_name(f"{self.output.name.removesuffix('.json')}.cache")

    @property
    def asking_folder(self) -> Path:
        """Folder that is there while the model is asked; each job of a Slurm array has its own."""
        return self.output.with_name(
            f".{self.output.name}.asking{os.environ.get('SLURM_ARRAY_TASK_ID', '')}")

    @property
    def joining_folder(self) -> Path:
        """Folder that is there while the results are written."""
        return self.output.with_name(f".{self.output.name}.joining")
