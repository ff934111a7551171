"""Options and checks for `megatron-sov tools list | run ENV TARGET`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import (
    NO_FLAG, ActionGroup, AtLeastOne, DeclaredCommand, Flag, apply_changes, parse_nested)
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.infer.engine import EngineOptions
from megatron_sov.infer.request import WholeSampling
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import (
    BUILT_IN, ENVIRONMENT_PLUGINS, build_versioned_environment, read_tasks, request_environment)
from megatron_sov.runs.checkpoints import check_model

EPISODES_KIND = "episodes"


@dataclass(frozen=True, kw_only=True)
class ToolsListOptions:
    """List the built-in environments, and environments from plug-ins."""


@dataclass(frozen=True)
class TurnSampling(WholeSampling):
    """Sampling within a turn."""

    max_new_tokens: Annotated[AtLeastOne, NO_FLAG] = 1  # `EpisodeLimits` bounds turns


@dataclass(frozen=True, kw_only=True)
class ToolsRunOptions(EngineOptions, RedoOptions, OverwriteOptions):
    """Play an environment's tasks with a model."""

    environment: Annotated[str, Flag("ENV", help=f"{', '.join(BUILT_IN)}, or your own class, FILE.py:NAME")]
    tasks: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """A task per line (default: the environment's examples)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Setting for the environment, e.g. corpus=laws.jsonl; may be repeated."""
    limits: Literal["train", "test"] = "test"
    """Episode limits for training or for testing."""
    changes: Annotated[tuple[str, ...], Flag("--limit", "key=value")] = ()
    """Change a limit, e.g. max_turns=7; may be repeated."""
    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (newest checkpoint) or Hugging Face folder, with a chat template."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write: episodes.jsonl and a manifest."""
    parallel: Annotated[AtLeastOne, Flag("--concurrent")] = 8
    """Episodes at a time."""
    sampling: TurnSampling = field(default_factory=TurnSampling)


@dataclass(frozen=True)
class EpisodesRequest:
    """Checked input for `tools_run.play_tasks`."""

    options: ToolsRunOptions
    environment: PluginRequest
    version: str
    limits: EpisodeLimits
    tasks: Sequence[Mapping[str, Any]]


def list_environments(options: ToolsListOptions) -> None:
    lines = [(name, text) for name, (_, _, text) in BUILT_IN.items()] + ENVIRONMENT_PLUGINS.listing()
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


def check_episodes(options: ToolsRunOptions) -> EpisodesRequest:
    """Check environment, tasks, model path and output."""
    request = request_environment(options.environment, parse_nested(options.settings))
    environment, version = build_versioned_environment(request)
    limits = apply_changes(LIMITS[options.limits], options.changes, "--limit")
    tasks = read_tasks(environment, options.environment, options.tasks)
    check_model(options.target)
    check_output_folder(options.output, EPISODES_KIND, options.overwrite)
    return EpisodesRequest(options, request, version, limits, tasks)


TOOLS = ActionGroup({
    "list": DeclaredCommand(ToolsListOptions, list_environments),
    "run": DeclaredCommand(ToolsRunOptions, check_episodes,
                           "megatron_sov.commands.rl.store.tools_run:play_tasks")})
