"""Options of `sov-data synth`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, NotNegative, NotNegativeInt

Threads = Annotated[AtLeastOne, Le(4096)]
"""Number of concurrent requests; each has a thread in the command's process."""
Timeout = Annotated[NotNegative, Ge(0.1)]
"""Seconds for one attempt."""
MaxTokensField = Literal["max_tokens", "max_completion_tokens", "none"]
"""max_completion_tokens: for OpenAI's reasoning models; none: for endpoints that refuse both."""


@dataclass(frozen=True, kw_only=True)
class SynthModelOptions:
    """The model that writes samples, and the model that judges them."""

    engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """Writing model: an OpenAI-compatible URL, ending in /v1, or a checkpoint or Hugging Face folder."""
    model: Annotated[str, Flag(value="NAME")] = ""
    """The writing model's name at the address."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Environment variable with the key for the address (default: OPENAI_API_KEY)."""
    max_tokens_field: Annotated[MaxTokensField, Flag(value="NAME")] = "max_tokens"
    """Request field that limits the length of an answer: max_tokens, max_completion_tokens, or none."""
    judge_engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """Judging model, as --engine (default: the writing model)."""
    judge_model: Annotated[str, Flag(value="NAME")] = ""
    """The judging model's name at the address."""
    judge_api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Environment variable with the key for the judge's address."""
    judge_max_tokens: AtLeastOne = 1024
    """Maximum tokens per answer from the judging model, including thoughts."""
    accept_model: Annotated[tuple[str, ...], Flag(value="NAME")] = ()
    """Accept answers from this model in addition to --model and --judge-model (default: refuse other models'
    answers); may be repeated."""


@dataclass(frozen=True, kw_only=True)
class SynthLimitOptions:
    """Limits of a run."""

    threads: Threads = 16
    """Concurrent requests."""
    timeout: Annotated[Timeout, Flag(value="S")] = 600.0
    """Seconds for one request."""
    max_attempts: AtLeastOne = 5
    """Attempts for one request."""
    patience: Annotated[NotNegative, Flag(value="S")] = 600.0
    """Seconds to wait for a busy or unavailable endpoint (0: only --max-attempts counts)."""
    max_tokens_total: NotNegativeInt = 0
    """Most tokens for all commands on this folder together; at the limit, exit with 75 (0: no limit)."""


@dataclass(frozen=True, kw_only=True)
class SynthOptions(SynthModelOptions, SynthLimitOptions):
    """Make data with a model: a generator sends prompts, checks the answers, and keeps the samples that pass.

    The same command continues after a kill, and pays for each answer once. A command that reaches a limit
    ends with 75, and continues after the limit is raised.

    Generators: --list. Files in the output folder: docs/synth.md."""

    generator: Annotated[str, Flag("GENERATOR|FILE.yaml")] = ""
    """A generator's name, or a generator file."""
    list: bool = False
    """List the generators, or GENERATOR's settings, and exit."""
    input: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """Generator input: files, or folders with files."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Output folder."""
    changes: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Generator setting."""
    checks: Annotated[Path | None, Flag(value="FILE.yaml")] = None
    """Pipeline steps that judge all finished samples (default: the steps for the generator, or for its record
    kind)."""
    limit: AtLeastOne | None = None
    """Process the first N items only."""
    redo: bool = False
    """Make all items again, with other settings or models, or a changed input; answers to unchanged requests
    cost nothing."""
    workers: AtLeastOne | None = None
    """Processes for the checks (default: this machine's cores)."""


SYNTH = DeclaredCommand(SynthOptions, run_function="data_prep.synth.synth_run:run_synth", runs_in_checks=True)
