"""An environment played by a person, or by a file of calls: to see what a model would see."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.documents.rows import read_objects
from megatron_sov.errors import UserError
from megatron_sov.rewards.reward import Result
from megatron_sov.tools.faults import INFRASTRUCTURE
from megatron_sov.tools.host import EnvironmentHost, Opening
from megatron_sov.tools.limits import EpisodeLimits
from megatron_sov.tools.transcript import Transcript

HELP = ('write NAME {"argument": value} to call a tool, `tools` to see them again, `answer TEXT` to end, an '
        "empty line to give up")


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
