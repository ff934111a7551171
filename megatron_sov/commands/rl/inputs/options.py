"""Options for prompts and environments in reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import Flag, excludes_field, requires_field
from megatron_sov.infer.request import Batching, BatchSize
from megatron_sov.judge.tools.registry import BUILT_IN

VALIDATION_OPTION = "--validation"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are sampled from prompts."""

    plain: Annotated[bool, excludes_field("environment")] = False
    """Continue each prompt without the chat template."""
    environment: Annotated[str | None, Flag(
        value="ENV", help=f"Play the prompts as tasks in {', '.join(BUILT_IN)}, or your own class, "
                          "FILE.py:NAME")] = None
    env_set: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """Setting for the environment; may be repeated."""
    limit: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """Limit for an episode, e.g. max_turns=7; may be repeated."""
    batch_size: BatchSize = Batching.batch_size


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that name the prompts."""

    prompts: Annotated[Path, Flag(value="FILE|DIR")]
    """Rows in JSON lines, JSON, Parquet or Arrow, or a `datasets` folder. A row has `prompt`, `messages` or a
    task, and the fields that the reward needs."""
    renames: Annotated[tuple[str, ...], Flag("--columns", "TARGET=FIELD,...")] = ()
    """Rename fields: prompt=question,answer=solution; FIELD+FIELD joins two fields by a line feed."""
