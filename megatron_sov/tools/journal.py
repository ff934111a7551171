"""What has been played so far: a line for each turn, kept before the next round begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_sov.rewards.reward import Result
from megatron_sov.tools.environment import Observation, Task
from megatron_sov.tools.episode import Episode, Turn, Written
from megatron_sov.tools.host import Opening
from megatron_sov.work.journal import Journal


class EpisodeLines:
    """Lines of episodes: those that were kept before, and where more are kept."""

    def __init__(self, lines: Iterable[dict[str, Any]],
                 keep: Callable[[Sequence[dict[str, Any]]], object] = lambda lines: None) -> None:
        """`keep`: is given the lines of each round."""
        self._lines, self.add = lines, keep

    def episodes(self, tasks: Sequence[Task]) -> dict[int, Episode]:
        """Return number -> the episodes that had begun, as far as they had come."""
        found: dict[int, Episode] = {}
        for line in self._lines:
            number = line["episode"]
            if "prompt" in line:
                opening = Opening(Observation(**line["observation"]), tuple(line["tools"]))
                found[number] = Episode(number, tasks[number], opening, line["prompt"])
            elif "turn" in line:
                turn = line["turn"]
                found[number].turns.append(Turn(**turn | {"written": Written(**turn["written"])}))
            else:
                found[number].result = Result(**line["result"])
        return found


def begin_line(episode: Episode) -> dict[str, Any]:
    """Return the line of an episode that has begun."""
    return {"episode": episode.number, "prompt": episode.prompt,
            "observation": asdict(episode.opening.observation), "tools": list(episode.opening.tools)}


def turn_line(episode: Episode) -> dict[str, Any]:
    """Return the line of an episode's last turn."""
    return {"episode": episode.number, "turn": asdict(episode.turns[-1])}


def lines_of(episode: Episode) -> list[dict[str, Any]]:
    """Return all lines of an episode that goes on: what another process needs to go on with it."""
    return [begin_line(episode), *({"episode": episode.number, "turn": asdict(turn)}
                                   for turn in episode.turns)]


def result_line(episode: Episode) -> dict[str, Any]:
    """Return the line of an episode's reward."""
    assert episode.result is not None
    return {"episode": episode.number, "result": asdict(episode.result)}


def lines_in(journal: Journal) -> EpisodeLines:
    """Return the lines of a journal, which keeps more."""
    def keep(lines: Sequence[dict[str, Any]]) -> None:
        journal.add([(line["episode"], json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                     for line in lines])

    return EpisodeLines((json.loads(record) for _, record in journal.records()), keep)
