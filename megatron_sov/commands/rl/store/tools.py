"""Options and checks for `megatron-sov tools list | run ENV TARGET`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import (
    NO_FLAG, Actions, AtLeastOne, DeclaredCommand, Flag, add_actions, apply_changes, parse_nested, run_action)
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.infer.prompts import EngineOptions
from megatron_sov.infer.request import WholeSampling
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import (
    BUILT_IN, ENVIRONMENT_PLUGINS, build_versioned_environment, read_tasks, request_environment)
from megatron_sov.runs.checkpoints import check_model_path

EPISODES_KIND = "episodes"


@dataclass(frozen=True, kw_only=True)
class ToolsListOptions:
    """List the environments that there are."""


@dataclass(frozen=True)
class TurnSampling(WholeSampling):
    """Sampling within a turn."""

    max_new_tokens: Annotated[AtLeastOne, NO_FLAG] = 1  # `EpisodeLimits` bounds each turn


@dataclass(frozen=True, kw_only=True)
class ToolsRunOptions(EngineOptions, RedoOptions, OverwriteOptions):
    """Have a model play the tasks of an environment."""

    environment: Annotated[str, Flag("ENV", help=f"{', '.join(BUILT_IN)}, or your own class, FILE.py:NAME")]
    tasks: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """A task per line (default: the environment's examples)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Setting for the environment, e.g. corpus=laws.jsonl; may be repeated."""
    limits: Literal["train", "test"] = "test"
    """Limits for an episode, as in training or in testing."""
    changes: Annotated[tuple[str, ...], Flag("--limit", "key=value")] = ()
    """Another limit, e.g. max_turns=7; may be repeated."""
    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (its newest one) or Hugging Face folder, with a chat template."""
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


def list_environments(options: ToolsListOptions) -> int:
    lines = [(name, text) for name, (_, _, text) in BUILT_IN.items()] + ENVIRONMENT_PLUGINS.listing()
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    return ExitCode.OK


def check_episodes(options: ToolsRunOptions) -> EpisodesRequest:
    """Check environment, tasks, model path and output."""
    request = request_environment(options.environment, parse_nested(options.settings))
    environment, version = build_versioned_environment(request)
    limits = apply_changes(LIMITS[options.limits], options.changes, "--limit")
    tasks = read_tasks(environment, options.environment, options.tasks)
    check_model_path(options.target)
    check_output_folder(options.output, EPISODES_KIND, options.overwrite)
    return EpisodesRequest(options, request, version, limits, tasks)


ACTIONS: Actions = {
    "list": (ToolsListOptions, list_environments),
    "run": DeclaredCommand(ToolsRunOptions, check_episodes,
                           "megatron_sov.commands.rl.store.tools_run:play_tasks")}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
