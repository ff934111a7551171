"""What has been played so far: a line for each turn, on the disk before the next round begins.

A killed command leaves the folder beside its output; the same command goes on behind the last whole line of
each episode.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import disk_errors
from megatron_sov.errors import UserError
from megatron_sov.rewards.reward import Result
from megatron_sov.tools.environment import Observation, Task
from megatron_sov.tools.episode import Episode, Turn, Written
from megatron_sov.tools.host import Opening
from megatron_sov.work.locks import holding

LINES = "journal.jsonl"


class Journal:
    """Lines of a folder, added in rounds."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """`lines`: those that are there already, without the first."""
        self._path, self._lines = path, lines
        self._file = open(path, "ab")  # noqa: SIM115  (closed by `opened`)

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keep lines; a kill or a power cut behind this loses none of them."""
        with disk_errors(self._path):
            self._file.write(b"".join(_encoded(line) for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())

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

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk was told by `add`
            self._file.close()


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


def folder_of(output: Path) -> Path:
    """Return the folder of an output's journal."""
    return output.with_name(f".{output.name}.playing")


@contextlib.contextmanager
def opened(output: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """Open the journal of an output as a context, and remove it at the end, unless an error ends it.

    Args:
        output: what is to be made.
        identity: what the episodes depend on.

    Raises:
        UserError: another process writes it now, it belongs to something else, or nothing can be written.
    """
    identity = json.loads(json.dumps(identity))  # as its first line has it: a tuple is a list there
    folder = folder_of(output)
    path = folder / LINES
    with holding(folder, f"--output {output}"):
        lines = _whole_lines(path)
        if len(lines) == 1:  # no episode had begun
            path.unlink()
            lines = []
        if lines and lines[0] != {"identity": identity}:
            other = _different(lines[0].get("identity", {}), identity)
            raise UserError(f"--output {output}: {folder} holds episodes that were played with another "
                            f"{other}; ask for the same to go on, delete that folder, or name another output")
        journal = Journal(path, lines[1:])
        try:
            if not lines:
                journal.add([{"identity": identity}])
            yield journal
        finally:
            journal.close()
        shutil.rmtree(folder, ignore_errors=True)


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _different(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal; what a kill left of the next one is cut off."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    end = 0
    with open(path, "r+b") as f:
        for raw in f:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:  # a power cut may leave bytes that were never written
                line = None
            if line is None:
                break
            lines.append(line)
            end += len(raw)
        f.truncate(end)
    return lines
