"""What happened to a job so far: its attempts, told by `attempts.jsonl`, and what follows from them.

Every start of a job's script is an attempt.  It writes `begin`, and `end` unless it was cut off (its node
died, or Slurm took it away); the next one then writes the `end` in its place.  A new submission is a new job,
and begins with a clean record.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import MANIFEST
from megatron_sov.obs.events import EventLog, read_events

ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a job's script."""

    restart: int
    """How often Slurm had started the job before."""
    nodes: tuple[str, ...]
    """Where it ran."""
    progress: int
    """What was there when it began: optimizer steps in checkpoints, or files of an unfinished artifact."""
    end: dict[str, Any] | None
    """Its `end`; None: it runs, or was cut off."""

    @property
    def moved(self) -> bool:
        """Whether it left more than it found."""
        return self.end is not None and self.end["progress"] > self.progress


class History:
    """The attempts of one job."""

    def __init__(self, folder: Path, job: str) -> None:
        self._file, self._job = folder / ATTEMPTS, job
        records = [r for r in read_events(self._file) if r.get("job") == job]
        ends = {r["restart"]: r for r in records if r["event"] == "end"}
        self.attempts = [Attempt(r["restart"], tuple(r["nodes"]), r["progress"], ends.get(r["restart"]))
                         for r in records if r["event"] == "begin"]

    def cut_off(self, restart: int) -> Attempt | None:
        """Return the attempt before `restart`, if it was ended from outside: it wrote no end,
        or took itself for cancelled.

        A cancelled job does not begin again, so this one was put back, as Slurm does when another node than
        the script's dies.
        """
        before = [a for a in self.attempts if a.restart < restart]
        return before[-1] if before and (before[-1].end
                                         or {"outcome": "cancelled"})["outcome"] == "cancelled" else None

    def strikes(self) -> Counter[str]:
        """Return node -> failures that began there."""
        return Counter(node for a in self.attempts if a.end is not None for node in a.end["blamed"])

    def excluded(self, max_strikes: int) -> list[str]:
        """Return the nodes that the job must not run on any more: sick ones,
        and those with too many failures."""
        sick = {node for a in self.attempts if a.end is not None for node in a.end["sick"]}
        return sorted(sick | {node for node, count in self.strikes().items() if count >= max_strikes})

    def failures_in_a_row(self) -> int:
        """Return how many of the last attempts left nothing new, not counting those that
        found a sick node."""
        count = 0
        for attempt in reversed([a for a in self.attempts if a.end is not None]):
            if attempt.moved:
                break
            count += not (attempt.end or {})["sick"]
        return count

    def begin(self, restart: int, nodes: list[str], progress: int) -> None:
        """Record that an attempt begins."""
        self._write("begin", restart, nodes=nodes, progress=progress)

    def end(self, restart: int, outcome: str, reason: str, progress: int, *, blamed: list[str] | None = None,
            sick: list[str] | None = None) -> None:
        """Record how an attempt ended.

        Args:
            restart: which one.
            outcome: complete, gate, mistake, cancelled, stopped, crash, hang, corruption,
                cut_off or sick_nodes.
            reason: one sentence.
            progress: what is there now.
            blamed: nodes where the failure began.
            sick: nodes that did not pass the pre-flight check, or computed wrongly.
        """
        self._write("end", restart, outcome=outcome, reason=reason, progress=progress, blamed=blamed or [],
                    sick=sick or [])

    def _write(self, event: str, restart: int, **fields: Any) -> None:
        log = EventLog(self._file)
        log.write(event, job=self._job, restart=restart, **fields)
        log.close()
        self.__init__(self._file.parent, self._job)  # type: ignore[misc]  # what was written is what is known


def progress_of(target: Path) -> int:
    """Return a number that grows whenever a stage leaves something new behind.

    Args:
        target: the run's folder (steps of its newest checkpoints count, of all stages of an extension), the
            artifact's (files of its hidden, unfinished neighbours count), or a rollout store (its parts do).
    """
    steps = 0
    for folder in (target, *target.glob("stages/*")):
        steps += max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*") if p.name[5:].isdigit()),
                     default=0)
    parts = sum(1 for pattern in ("rollouts/*", "rewards/*/*") for _ in target.glob(f"{pattern}/{MANIFEST}"))
    hidden = (path for folder in target.parent.glob(f".{target.name}*") for path in folder.rglob("*"))
    return steps + parts + sum(path.is_file() for path in hidden)
