"""Episodes to read, turn by turn, as a page; and those that a person plays, or a file of calls, to see what a
model would see."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.chat.tool_calls import ToolCall
from megatron_sov.base.documents.rows import read_objects
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.tools.episode import Episode
from megatron_sov.judge.tools.faults import FAULTS, INFRASTRUCTURE
from megatron_sov.judge.tools.host import EnvironmentHost, Opening
from megatron_sov.judge.tools.limits import EpisodeLimits, cut

MAX_CHAPTERS = 200
"""Episodes on a page: those without a reward first, then the lowest."""
MAX_CHARS = 20_000
"""Of one thing said."""
HELP = ('write NAME {"argument": value} to call a tool, `tools` to see them again, `answer TEXT` to end, an '
        "empty line to give up")


@dataclass(frozen=True)
class Transcript:
    """What is shown of an episode."""

    name: str
    """Such as "episode 3"."""
    opening: Opening
    """How it began."""
    turns: list[tuple[str, str]]
    """(who, what was said), in order."""
    end: str
    """One of `episode.ENDS`."""
    faults: Mapping[str, int]
    """Fault -> calls."""
    result: Result
    """The reward, or why there is none."""


def transcript_of(episode: Episode) -> Transcript:
    """Return what is shown of an ended episode."""
    assert episode.result is not None
    turns = []
    for turn in episode.turns:
        turns.append(("model", turn.text))
        turns += [(_caller(call["name"], call["fault"]), call["text"]) for call in turn.calls]
    return Transcript(f"Episode {episode.number + 1}", episode.opening, turns, episode.end, episode.faults(),
                      episode.result)


def _caller(name: str, fault: str) -> str:
    return f"tool {name}".strip() + (f" ({fault})" if fault else "")


def page_of(title: str, transcripts: Sequence[Transcript], limits: EpisodeLimits,
            figures: Mapping[str, str]) -> str:
    """Return the page of episodes.

    Args:
        title: its heading.
        transcripts: of all of them.
        limits: that they had.
        figures: name -> value of what else stands beside the mean reward.
    """
    def worst_first(transcript: Transcript) -> float:
        return float("-inf") if transcript.result.reward is None else transcript.result.reward

    shown = sorted(transcripts, key=worst_first)[:MAX_CHAPTERS]
    left_out = len(transcripts) - len(shown)
    rows = [[name, value] for name, value in [*figures.items(), *(
        (f"limit {name}", f"{value:g}") for name, value in asdict(limits).items())]]
    return render("Tool episodes", title, f"{len(transcripts):,} episodes"
                  + (f"; the {len(shown)} with the lowest rewards are shown" if left_out else ""),
                  [_chapter(transcript) for transcript in shown],
                  overview=("Figures and limits", PageTable(["figure", "value"], rows)), anchor="episode",
                  nothing="Nothing was said.")


def _chapter(transcript: Transcript) -> Chapter:
    result, seen = transcript.result, transcript.opening.observation
    reward = result.status if result.reward is None else f"{result.reward:g}"
    figures = [("reward", reward, result.reason), ("end", transcript.end, ""),
               *((name, str(count), FAULTS.get(name, "")) for name, count in transcript.faults.items())]
    said = [*([("system", seen.system)] if seen.system else []), ("user", seen.user), *transcript.turns]
    beside = {"components": dict(result.components), "tools": list(transcript.opening.tools)}
    return Chapter(transcript.name, transcript.end, figures, [PageSection(
        "Transcript", turns=[(who, cut(text, MAX_CHARS)[0]) for who, text in said]),
        PageSection("Goal and tools", json=json.dumps(beside, indent=1, ensure_ascii=False))])


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is counted over ended episodes; the mean is that of those with a reward."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    faults: Counter[str] = Counter()
    for row in rows:
        faults.update(row["faults"])
    return {
        "num_episodes": len(rows), "num_scored": len(rewards),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "statuses": dict(Counter(row["status"] for row in rows)),
        "ends": dict(Counter(row["end"] for row in rows)), "faults": dict(faults),
        "num_turns": sum(row["num_turns"] for row in rows),
        "num_calls": sum(row["num_calls"] for row in rows),
        "num_cut": sum(row["num_cut"] for row in rows),
        "num_turns_that_differ": sum(row["num_turns_that_differ"] for row in rows),
    }


class Answer(str):
    """What is said in the end."""


Move = ToolCall | Answer


def moves_of_file(path: Path) -> Iterator[Move]:
    """Yield the moves of a file: lines with `name` and `arguments`, or with `answer`.

    Raises:
        UserError: a line is something else.
    """
    for number, line in read_objects(path, "--calls"):
        if set(line) == {"answer"} and isinstance(line["answer"], str):
            yield Answer(line["answer"])
        elif set(line) == {"name", "arguments"} and isinstance(line["name"], str) \
                and isinstance(line["arguments"], dict):
            yield ToolCall(line["name"], line["arguments"])
        else:
            raise UserError(f"--calls {path}: line {number}: must be "
                            '{"name": ..., "arguments": {...}} or {"answer": ...}')


def moves_of_lines(lines: Iterable[str], show: Callable[[str], object],
                   show_tools: Callable[[], object]) -> Iterator[Move]:
    """Yield the moves that a person writes; what is none is told, and asked for again."""
    show(HELP)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        if word == "answer":
            yield Answer(rest.strip())
        elif word == "tools":
            show_tools()
        else:
            try:
                arguments = json.loads(rest.strip() or "{}")
            except ValueError as e:
                show(f"{rest.strip()[:60]!r} is no JSON ({e}); {HELP}")
                continue
            if isinstance(arguments, dict):
                yield ToolCall(word, arguments)
            else:
                show(f"{rest.strip()[:60]!r} is no JSON object; {HELP}")


def play_by_hand(host: EnvironmentHost, opening: Opening, moves: Iterable[Move], limits: EpisodeLimits,
                 show: Callable[[str], object]) -> Transcript:
    """Return the transcript of an episode that has begun; each call is a turn.

    Args:
        host: of the environment, reset to a task.
        opening: as `host.reset` gave it.
        moves: in order.
        limits: of turns and results.
        show: is given each result.
    """
    turns: list[tuple[str, str]] = []
    faults: Counter[str] = Counter()
    end, answer = "unended", ""
    for place, move in enumerate(moves):
        if place >= limits.max_turns:
            end = "turns"
            show(f"the limit of {limits.max_turns} turns is reached")
            break
        if isinstance(move, Answer):
            turns.append(("model", str(move)))
            end, answer = "answered", str(move)
            break
        turns.append(("model", f"{move.name} {json.dumps(move.arguments, ensure_ascii=False)}"))
        called = host.call(move)
        faults.update([called.fault] if called.fault else [])
        turns.append((f"tool {move.name}" + (f" ({called.fault})" if called.fault else ""), called.text))
        show(called.text)
        if called.fault == INFRASTRUCTURE:
            return Transcript("Episode 1", opening, turns, INFRASTRUCTURE, faults,
                              Result(None, "failed", {}, called.text))
    return Transcript("Episode 1", opening, turns, end, faults, host.score(answer))
