"""Tasks that are played with tools: their files, their episodes, and the scores of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.chat.turns import TurnEncoder
from megatron_sov.eval.lm.task_files import DATA
from megatron_sov.eval.suites.catalogue import TaskFile
from megatron_sov.eval.suites.folding import fold, folded_results
from megatron_sov.eval.suites.items import Folded, Item, Response
from megatron_sov.eval.suites.protocol import Protocol
from megatron_sov.eval.suites.task_data import TaskData
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.reward import Result
from megatron_sov.tools import registry
from megatron_sov.tools.environment import Task
from megatron_sov.tools.episode import Episode, EpisodeLines
from megatron_sov.tools.faults import INFRASTRUCTURE
from megatron_sov.tools.playing import MessageTable, Policy, Speaker, Table, play, play_by_messages


def tasks_of(task: TaskFile, data_dir: Path, limit: int | None = None) -> list[Task]:
    """Return what is to be played.

    Raises:
        UserError: a file is missing, or a row breaks a rule.
    """
    data = TaskData.of(task.sov)
    found: list[Task] = [row for paths in task.files(data_dir).values() for path in paths
                         for _, row in data.rows(path)]
    return found if limit is None else found[:limit]


def order_of(protocol: Protocol, data_dir: Path) -> Order:
    """Return the order for a protocol's environment.

    Raises:
        UserError: there is none of that name.
    """
    settings = {name: value.replace(DATA, str(data_dir)) if isinstance(value, str) else value
                for name, value in protocol.environment_settings.items()}
    return registry.order(protocol.environment, settings)


def play_tasks(protocol: Protocol, tasks: Sequence[Task], data_dir: Path, policy: Policy,
               encoder: TurnEncoder, journal: EpisodeLines, *, parallel: int = 8,
               ended: Callable[[int], object] = lambda count: None,
               check: Callable[[], object] = lambda: None) -> list[list[Episode]]:
    """Return the episodes of each task, as many as the protocol has samples.

    Args:
        protocol: of the tasks.
        tasks: what is to be done.
        data_dir: the user's folder of data.
        policy: writes the turns; made with the protocol's sampling.
        encoder: of the model's chat template.
        journal: what was played before, and where this is kept.
        parallel: episodes at a time.
        ended: is told how many more episodes have ended.
        check: called behind each round; what it raises ends the play, and the journal keeps what was said.

    Raises:
        UserError: the environment cannot be made, or a task is none of its own.
        Exception: what `check` raises.
    """
    table = Table(order_of(protocol, data_dir), encoder, protocol.episode_limits, parallel)
    return _of_tasks(play(_repeated(protocol, tasks), policy, table, journal, ended, lambda: bool(check())),
                     protocol)


def play_tasks_by_messages(protocol: Protocol, tasks: Sequence[Task], data_dir: Path, speaker: Speaker,
                           journal: EpisodeLines, *, parallel: int = 8,
                           ended: Callable[[int], object] = lambda count: None,
                           check: Callable[[], object] = lambda: None) -> list[list[Episode]]:
    """Return the episodes of each task of a model that is asked with messages; see `play_tasks`."""
    table = MessageTable(order_of(protocol, data_dir), protocol.episode_limits, parallel)
    return _of_tasks(play_by_messages(_repeated(protocol, tasks), speaker, table, journal, ended, check),
                     protocol)


def _repeated(protocol: Protocol, tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks for _ in range(protocol.samples)]


def _of_tasks(episodes: Sequence[Episode], protocol: Protocol) -> list[list[Episode]]:
    return [list(episodes[i:i + protocol.samples]) for i in range(0, len(episodes), protocol.samples)]


def fold_episodes(protocol: Protocol, tasks: Sequence[Task], episodes: Sequence[Sequence[Episode]],
                  data_dir: Path, workers: int = 0) -> Folded:
    """Return the scores of tasks whose episodes have ended; raises as `fold` does."""
    items = [item_of(protocol, task, played) for task, played in zip(tasks, episodes, strict=True)]
    if protocol.reward:  # of the answer; an episode that failed has none to judge
        return _without_failed(fold(protocol, items, workers), episodes)
    results = [[_result(protocol, episode) for episode in played] for played in episodes]
    _, version = registry.make(order_of(protocol, data_dir))
    return folded_results(protocol, items, {"": results}, {"environment": {
        "name": protocol.environment, "version": version, "settings": dict(protocol.environment_settings)}})


def item_of(protocol: Protocol, task: Mapping[str, Any], episodes: Sequence[Episode]) -> Item:
    """Return a task with what was answered."""
    return Item(task, str(task.get("question", "")),
                [Response(episode.answer, _finish(protocol, episode)) for episode in episodes])


def _finish(protocol: Protocol, episode: Episode) -> str:
    """Return how an episode ended; where one turn is all that is asked for, it is no limit."""
    return "stop" if episode.end == "answered" or (
        episode.end == "turns" and protocol.episode_limits.max_turns == 1) else episode.end


def _result(protocol: Protocol, episode: Episode) -> Result:
    assert episode.result is not None, f"episode {episode.number} has not ended"
    # a call of a function that does not exist, or of none at all, is not noted by the world: one too many
    if protocol.environment == "functions" and episode.result.reward and episode.faults():
        return dataclasses.replace(episode.result, reward=0.0)
    return episode.result


def _without_failed(folded: Folded, episodes: Sequence[Sequence[Episode]]) -> Folded:
    """Return scores without those of items of which an episode failed by what it ran on."""
    items = []
    for item, played in zip(folded.items, episodes, strict=True):
        failed = [episode for episode in played if episode.end == INFRASTRUCTURE]
        if failed:
            item = dataclasses.replace(
                item, scores={}, failed=f"{len(failed)} of {len(played)} episodes failed by what they ran on")
        items.append(item)
    return dataclasses.replace(folded, items=items)
