"""`megatron-sov tools list | run ENV TARGET`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.settings import (
    NO_FLAG, Actions, AtLeastOne, Flag, add_actions, apply_changes, parse_nested, run_action)
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.prompts import EngineOptions
from megatron_sov.infer.request import WholeSampling
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.episode import Episode, lines_in, row_of
from megatron_sov.judge.tools.playing import EpisodeTable, ToolPolicy, identity_of, play, summary_of
from megatron_sov.judge.tools.registry import BUILT_IN, OWN, digest_of, make, order, tasks_of
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.work.progress.journal import open_journal
from megatron_sov.work.progress.progress_bar import create_bar

KIND = "episodes"
"""Of the artifact that `run` writes."""


@dataclass(frozen=True, kw_only=True)
class ToolsListOptions:
    """List the environments that there are."""


@dataclass(frozen=True)
class TurnSampling(WholeSampling):
    """How each token of a turn is chosen."""

    max_new_tokens: Annotated[AtLeastOne, NO_FLAG] = 1  # its limit bounds each turn


@dataclass(frozen=True, kw_only=True)
class ToolsRunOptions(EngineOptions, RedoOptions, OverwriteOptions):
    """Have a model play the tasks of an environment."""

    environment: Annotated[str, Flag("ENV", help=f"{', '.join(BUILT_IN)}, or a class of your own, "
                                                 "FILE.py:NAME")]
    tasks: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """A task per line (default: the environment's examples)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """A setting of the environment, e.g. corpus=laws.jsonl; may be repeated."""
    limits: Literal["train", "test"] = "test"
    """Of an episode: those for training or for testing."""
    changes: Annotated[tuple[str, ...], Flag("--limit", "key=value")] = ()
    """Another limit, e.g. max_turns=7; may be repeated."""
    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (its newest one) or Hugging Face folder, with a chat template."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write: episodes.jsonl and a manifest."""
    parallel: Annotated[AtLeastOne, Flag("--concurrent")] = 8
    """Episodes at a time."""
    sampling: TurnSampling = field(default_factory=TurnSampling)


def _list(args: ToolsListOptions) -> int:
    lines = [(name, text) for name, (_, _, text) in BUILT_IN.items()] + OWN.listing()
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    return 0


def _run(args: ToolsRunOptions) -> int:
    asked = order(args.environment, parse_nested(args.settings))
    environment, version = make(asked)
    limits = apply_changes(LIMITS[args.limits], args.changes, "--limit")
    tasks = tasks_of(environment, args.environment, args.tasks)
    check_model_path(args.target)
    check_output_folder(args.output, KIND, args.overwrite)

    from megatron_sov.infer.tool_policy import EngineChoice, EpisodePlayer
    from megatron_sov.post.distillation.teacher import hash_weights

    choice = EngineChoice(args.engine, args.engine_set, args.nproc, ENGINE_SET)
    player = EpisodePlayer(args.target, choice, limits, "lower them with --limit")
    target, encoder = player.target, player.encoder
    settings = {name: getattr(args.sampling, name) for name in ("temperature", "top_p", "seed")}
    settings["engine"] = player.engine
    model: dict[str, object] = {"path": str(target.path), "step": target.step,
                                "weights": hash_weights(target), "chat": player.chat}
    identity = identity_of(digest_of(tasks), version, limits, model, settings)
    table = EpisodeTable(asked, encoder, limits, args.parallel)

    def played(policy: ToolPolicy) -> dict[str, Any]:
        with (open_journal(args.output, "megatron-sov tools run", identity, redo=args.redo) as journal,
              create_bar("play", len(tasks), "episode") as bar):
            episodes = play(tasks, policy, table, lines_in(journal), bar.update)
            return _publish(args, episodes, encoder, limits, identity)

    summary = player.run(args.sampling, args.parallel, played)
    if summary is not None:
        _tell(args.output, args.environment, summary, limits)
    return 0


def _publish(args: ToolsRunOptions, episodes: list[Episode], encoder: TurnEncoder, limits: EpisodeLimits,
             identity: dict[str, object]) -> dict[str, Any]:
    """Write the episodes as an artifact; returns what is counted over them."""
    rows = [row_of(episode, encoder) for episode in episodes]
    summary = summary_of(rows)
    with create_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (artifact.path / "episodes.jsonl").write_text("".join(lines), encoding="utf-8")
        artifact.content = summary | {"limits": asdict(limits)}
        artifact.settings = identity | {"environment_name": args.environment, "settings": list(args.settings)}
    return summary


def _tell(output: Path, name: str, summary: dict[str, Any], limits: EpisodeLimits) -> None:
    mean = summary["mean_reward"]
    counts = ", ".join(f"{count:,} {end}" for end, count in sorted(summary["ends"].items()))
    faults = ", ".join(f"{count:,} {fault}" for fault, count in sorted(summary["faults"].items()))
    print(f"{output}: {name}: {summary['num_episodes']:,} episodes ({counts}), "
          + (f"mean reward {mean:.4f} of {summary['num_scored']:,}" if mean is not None else "none scored"))
    print(f"  limits: {', '.join(f'{key} {value:g}' for key, value in asdict(limits).items())}")
    if faults:
        print(f"  of {summary['num_calls']:,} calls without result: {faults}")
    print(f"  of {summary['num_turns']:,} turns {summary['num_turns_that_differ']:,} have other tokens when "
          "their text is encoded again")


ACTIONS: Actions = {"list": (ToolsListOptions, _list), "run": (ToolsRunOptions, _run)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
