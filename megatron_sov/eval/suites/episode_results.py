"""Scores of episodes in the form of `eval lm`'s results, so that tables and cards read both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sov.artifacts import sha256_file
from megatron_sov.eval.lm.results import (
    EvaluatedModel,
    Item,
    Results,
    Sample,
    TaskSampling,
    TaskScores,
    judged_by,
    metric_of_items,
    write_results,
)
from megatron_sov.eval.suites.catalogue import TaskFile
from megatron_sov.eval.suites.items import Folded
from megatron_sov.eval.suites.protocol import Protocol
from megatron_sov.tools.environment import Task
from megatron_sov.tools.episode import Episode


def write_episodes(output: Path, task: TaskFile, protocol: Protocol, model: EvaluatedModel,
                   tasks: Sequence[Task], episodes: Sequence[Sequence[Episode]], folded: Folded,
                   data_dir: Path, limit: int | None) -> Results:
    """Write what was found; returns it.

    Args:
        output: the file.
        task: which.
        protocol: as it was played.
        model: that played.
        tasks: what was to be done.
        episodes: of each.
        folded: their scores.
        data_dir: the user's folder of data.
        limit: items that were played at most.

    Raises:
        UserError: nothing can be written there.
    """
    items = []
    for number, (asked, played, of_item) in enumerate(zip(tasks, episodes, folded.items, strict=True)):
        samples = tuple(Sample("\n".join(turn.text for turn in episode.turns), episode.end, reward)
                        for episode, reward in zip(played, of_item.sample_scores, strict=True))
        values = {name: of_item.scores.get(name) for name in folded.metric_names}
        items.append(Item(task.name, str(number), _hash(dict(asked)), protocol.cluster(asked),
                          str(asked.get("question", "")), str(asked.get("answer", "")), values, samples,
                          of_item.failed))
    files = {path.relative_to(data_dir).as_posix(): sha256_file(path)
             for paths in task.files(data_dir).values() for path in paths}
    told = protocol.as_json()
    prompts = [list(episode.prompt) or asdict(episode.opening) for played in episodes for episode in played]
    scores = TaskScores(
        _hash([dict(task.config), asdict(protocol), files]), str(task.config.get("output_type")), len(items),
        tuple(metric_of_items(name, items, []) for name in folded.metric_names), {"files": files}, 0,
        _hash(prompts), True, protocol.mode, TaskSampling(**told["sampling"]), judged_by(folded.judge),
        told["agent_limits"], limit,
        sum(item.failed is not None for item in items), sum(item.num_at_limit for item in folded.items), None,
        protocol.published_as or None)
    return write_results(output, Results(model, {task.name: scores}, {}), items)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()
