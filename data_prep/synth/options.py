"""The options of `sov-data synth`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import AtLeastOne, Flag, NotNegative, NotNegativeInt

Threads = Annotated[AtLeastOne, Le(4096)]
"""Each is a thread of this process."""
Timeout = Annotated[NotNegative, Ge(0.1)]
"""Seconds of an attempt."""
MaxTokensField = Literal["max_tokens", "max_completion_tokens", "none"]
"""max_completion_tokens: for OpenAI's reasoning models; none: for endpoints that refuse both."""


@dataclass(frozen=True, kw_only=True)
class SynthModelOptions:
    """Who writes, and who judges."""

    engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """The model that writes: an OpenAI-compatible address up to /v1, or a checkpoint or Hugging Face
    folder."""
    model: Annotated[str, Flag(value="NAME")] = ""
    """Its name at the address."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key of the address (default: OPENAI_API_KEY)."""
    max_tokens_field: Annotated[MaxTokensField, Flag(value="NAME")] = "max_tokens"
    """Field of requests for the longest answer: max_tokens, max_completion_tokens, or none."""
    judge_engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """The model that judges, likewise (default: that which writes)."""
    judge_model: Annotated[str, Flag(value="NAME")] = ""
    """Its name at the address."""
    judge_api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key of the judge's address."""
    judge_max_tokens: AtLeastOne = 1024
    """Longest answer of whoever judges, with its thoughts."""
    accept_model: Annotated[tuple[str, ...], Flag(value="NAME")] = ()
    """Use answers of this model too, where an endpoint answers with another model than --model or
    --judge-model (default: refuse them); may be repeated."""


@dataclass(frozen=True, kw_only=True)
class SynthLimitOptions:
    """What a run may take."""

    threads: Threads = 16
    """Requests at a time."""
    timeout: Annotated[Timeout, Flag(value="S")] = 600.0
    """Seconds for one request."""
    max_attempts: AtLeastOne = 5
    """For one request."""
    patience: Annotated[NotNegative, Flag(value="S")] = 600.0
    """Seconds that an endpoint which is full or away is waited for."""
    max_tokens_total: NotNegativeInt = 0
    """End with 75 before all commands on this folder have used more tokens (0: no limit)."""


@dataclass(frozen=True, kw_only=True)
class SynthOptions(SynthModelOptions, SynthLimitOptions):
    """Make data with a model: a generator asks, checks the answers, and keeps the samples that pass.

    A killed command goes on when it is run again, and pays for each answer once.  A command that has used up
    a limit ends with 75 and goes on when the limit is raised."""

    generator: Annotated[str, Flag("GENERATOR|FILE.yaml")] = ""
    """Generator, or the file of one."""
    list: bool = False
    """List the generators, or the settings of GENERATOR, and end."""
    input: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """What items are made from: files, or folders of them."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder of the run."""
    changes: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Setting of the generator."""
    checks: Annotated[Path | None, Flag(value="FILE.yaml")] = None
    """Steps that samples go through when all are made, as pipeline files have them (default: the
    generator's, or those of its kind of record)."""
    limit: AtLeastOne | None = None
    """First N items alone."""
    redo: bool = False
    """Make all items again, with other settings or models, or a changed input; answers that still fit cost
    nothing."""
    workers: AtLeastOne | None = None
    """Processes of the checks (default: this machine's cores)."""
