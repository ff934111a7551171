"""What an evaluation can be told.  No torch and no lm_eval here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.eval.lm.tasks import TaskSources
from megatron_sov.generate.request import Batching

OTHER_MODEL = ("name another --cache for its answers, or pass --same-model if only the engine changed; then "
               "the kept answers are used")
"""What a user may do whose endpoint does not say what it said before."""


@dataclass(frozen=True)
class EndpointSettings:
    """How an OpenAI-compatible endpoint is asked."""

    model: str = ""
    """Name that it knows the model by."""
    tokenizer: Path | None = None
    """Folder of its model's tokenizer, without which no likelihood can be asked for."""
    key_env: str = "OPENAI_API_KEY"
    """Variable of the environment with the key; none is sent where it is not set."""
    max_concurrent: int = 16
    """Requests under way at a time."""
    same_model: bool = False
    """Whether its model is the one whose answers are kept though it answers fixed questions otherwise."""
    timeout_s: float = 600.0
    """For one request."""
    max_attempts: int = 5
    """For one request, before its item has failed."""

    def problems(self) -> list[str]:
        """Return one sentence for each value that has no meaning, by the name of the command's option."""
        rules = [(bool(self.model), "--model: is missing; an endpoint may know several models, name one"),
                 (self.max_concurrent >= 1, f"--concurrent {self.max_concurrent}: must be at least 1"),
                 (self.timeout_s > 0, f"--timeout {self.timeout_s:g}: must be greater than 0 s"),
                 (self.max_attempts >= 1, f"--attempts {self.max_attempts}: must be at least 1")]
        return [said for holds, said in rules if not holds]


@dataclass(frozen=True)
class Settings:
    """What an evaluation depends on beside the model and the names of its tasks."""

    output: Path
    """The results file; its items come to lie beside it."""
    sources: TaskSources = field(default_factory=TaskSources)
    """Where tasks and their data come from."""
    cache: Path | None = None
    """Folder of answers, which several evaluations may share; None: OUT.cache beside the output."""
    run: Path | None = None
    """Run whose events the figures are added to."""
    num_items: int | None = None
    """Only so many items of each task, the first ones."""
    num_fewshot: int | None = None
    """Examples in front of each item; None: as the task says."""
    chat_template: bool = False
    """Whether prompts are framed by the model's chat template."""
    mode: str | None = None
    """Of a reasoning model, in place of the tasks' own: `thinking` or `no-thinking`."""
    engine: str | None = None
    """What runs the model; None: transformers for a Hugging Face folder, else megatron."""
    settings: tuple[str, ...] = ()
    """`key=value` changes of layout and precision (megatron)."""
    nproc: int | None = None
    """Local processes (megatron)."""
    batch_size: int = Batching.max_sequences
    """Continuations that are written at a time."""
    max_length_tokens: int | None = None
    """Longest sequence; None: the model's own."""
    max_gen_tokens: int | None = None
    """Longest answer, where it is to be shorter than a task's own."""
    seed: int = 0
    """Of samples."""
    workers: int = 0
    """Processes that judge; 0: one for each core."""
    samples: int | None = None
    """Answers to each item of a task that samples several, in place of its own number."""
    judge: tuple[str, ...] = ()
    """`key=value` settings of the reward that judges answers, such as `endpoint` and `model` of a judge."""
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    """Used where the target is an address."""

    def problems(self) -> list[str]:
        """Return one sentence for each value that has no meaning, by the name of the command's option."""
        least = {"--limit": (self.num_items, 1), "--num-fewshot": (self.num_fewshot, 0),
                 "--max-length": (self.max_length_tokens, 2), "--max-gen-tokens": (self.max_gen_tokens, 1),
                 "--nproc": (self.nproc, 1), "--seed": (self.seed, 0), "--samples": (self.samples, 1),
                 "--workers": (self.workers, 0)}
        found = [*(f"{name} {value}: must be at least {bound}" for name, (value, bound) in least.items()
                   if value is not None and value < bound), *map(str, Batching(self.batch_size).problems())]
        if self.mode is not None and not self.chat_template:
            found.append(f"--mode {self.mode}: is a setting of the chat template; add --apply-chat-template, "
                         "or leave it out")
        return found

    @property
    def cache_folder(self) -> Path:
        """Folder of answers."""
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
