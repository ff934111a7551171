"""Runs `megatron-sov tools run`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.commands.rl.store.tools import EPISODES_KIND, EpisodesRequest
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.tool_policy import EngineChoice, EpisodePlayer
from megatron_sov.judge.tools.episode import Episode, build_row, open_episode_lines
from megatron_sov.judge.tools.playing import (
    EpisodeSettings, ToolPolicy, build_identity, play_episodes, summarize_rows)
from megatron_sov.judge.tools.registry import hash_tasks
from megatron_sov.post.distillation.teacher import hash_weights
from megatron_sov.work.progress.journal import open_journal
from megatron_sov.work.progress.progress_bar import create_bar


def play_tasks(request: EpisodesRequest) -> None:
    """Play the tasks with the model, write the episodes, and print a summary."""
    options, limits = request.options, request.limits
    choice = EngineChoice(options.engine, options.engine_set, options.nproc, ENGINE_SET)
    player = EpisodePlayer(options.target, choice, limits, "lower them with --limit")
    identity = _build_identity(request, player)
    episode_settings = EpisodeSettings(request.environment, player.encoder, limits, options.parallel)

    def play_with_policy(policy: ToolPolicy) -> dict[str, Any]:
        with (open_journal(options.output, "megatron-sov tools run", identity, redo=options.redo) as journal,
              create_bar("play", len(request.tasks), "episode") as bar):
            episodes = play_episodes(request.tasks, policy, episode_settings, open_episode_lines(journal),
                                     bar.update)
            return _write_episodes(request, episodes, player.encoder, identity)

    summary = player.run(options.sampling, options.parallel, play_with_policy)
    if summary is not None:  # the first process
        _print_summary(request, summary)


def _build_identity(request: EpisodesRequest, player: EpisodePlayer) -> dict[str, object]:
    """Return tasks, environment, limits, model and sampling. A journal continues only if they are equal."""
    sampling, target = request.options.sampling, player.target
    settings: dict[str, object] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        "engine": player.engine}
    model: dict[str, object] = {"path": str(target.path), "step": target.step,
                                "weights": hash_weights(target), "chat": player.chat}
    identity: dict[str, object] = build_identity(hash_tasks(request.tasks), request.version, request.limits,
                                                 model, settings)
    return identity


def _write_episodes(request: EpisodesRequest, episodes: Sequence[Episode], encoder: TurnEncoder,
                    identity: dict[str, object]) -> dict[str, Any]:
    """Write the episodes to an artifact and return the summary."""
    options = request.options
    rows = [build_row(episode, encoder) for episode in episodes]
    summary = summarize_rows(rows)
    with create_artifact(options.output, EPISODES_KIND, overwrite=options.overwrite) as artifact:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (artifact.path / "episodes.jsonl").write_text("".join(lines), encoding="utf-8")
        artifact.content = summary | {"limits": asdict(request.limits)}
        artifact.settings = identity | {"environment_name": options.environment,
                                        "settings": list(options.settings)}
    return summary


def _print_summary(request: EpisodesRequest, summary: dict[str, Any]) -> None:
    mean = summary["mean_reward"]
    counts = ", ".join(f"{count:,} {end}" for end, count in sorted(summary["ends"].items()))
    faults = ", ".join(f"{count:,} {fault}" for fault, count in sorted(summary["faults"].items()))
    rewards = "none scored" if mean is None else f"mean reward {mean:.4f} of {summary['num_scored']:,}"
    print(f"{request.options.output}: {request.options.environment}: {summary['num_episodes']:,} episodes "
          f"({counts}), {rewards}")
    print(f"  limits: {', '.join(f'{key} {value:g}' for key, value in asdict(request.limits).items())}")
    if faults:
        print(f"  of {summary['num_calls']:,} calls without result: {faults}")
    print(f"  of {summary['num_turns']:,} turns {summary['num_turns_that_differ']:,} have different tokens "
          "after decoding and encoding")
