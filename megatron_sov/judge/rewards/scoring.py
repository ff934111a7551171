"""Scoring a file of answers: rows in order, batch by batch, kept as they come, and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import file_digest
from megatron_sov.base.documents.rows import json_line, read_rows
from megatron_sov.base.plugins.registry import PluginOrder
from megatron_sov.judge.rewards.registry import MadeReward
from megatron_sov.judge.rewards.reward import Result, Row
from megatron_sov.judge.rewards.running import runner
from megatron_sov.work.progress.jobs import Job, here, run_job

MAX_TOLD = 10
"""Rows without a reward that are named."""
BATCH_ROWS = 128
"""Rows that are scored together, and lost at most when the command is killed."""
Batch = list[tuple[int, Row]]
"""Lines of the file, and their rows."""


@dataclass
class ScoringTally:
    """Of the verdicts that were counted."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Status -> rows."""
    num_rewards: int = 0
    """Rows that have a reward."""
    reward_sum: float = 0.0
    """Of all of them."""
    told: list[str] = field(default_factory=list)
    """The first rows without a reward, of those that were counted with their place."""

    @property
    def mean(self) -> float | None:
        """Return the mean reward; None: no row has one."""
        return self.reward_sum / self.num_rewards if self.num_rewards else None

    def add(self, reward: float | None, status: str, reason: str = "", where: str = "") -> None:
        """Count a row; `where` it stands is told if it has no reward."""
        self.statuses[status] += 1
        if reward is not None:
            self.num_rewards += 1
            self.reward_sum += reward
        elif where and len(self.told) < MAX_TOLD:
            self.told.append(f"{where}: {status}: {reason}")

    def line(self, rows: str) -> str:
        """Return the counts as commands print them, e.g. "2 failed, 7 scored rows, mean reward 0.5000".

        Args:
            rows: what the rows are, in the plural.
        """
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(self.statuses.items())) or "0"
        return f"{counts} {rows}" + ("" if self.mean is None else f", mean reward {self.mean:.4f}")


@dataclass
class ScoringSummary:
    """What became of the rows."""

    tally: ScoringTally = field(default_factory=ScoringTally)
    """Of all rows."""
    num_kept: int = 0
    """Rows that an earlier, killed command had scored."""


def score_file(asked: PluginOrder, made: MadeReward, source: Path, output: Path, workers: int,
               progress: Callable[[int], object], *, redo: bool = False) -> ScoringSummary:
    """Score a file that `check_rows` has passed; the output appears whole, when all rows are there.

    Args:
        asked: the reward's order.
        made: the reward.
        source: rows.
        output: the file to make.
        workers: processes.
        progress: is called with a number of rows that are done.
        redo: begin anew where rows were scored by another reward, or are of another file.
    """
    summary = ScoringSummary()
    with runner(asked, made, workers) as running:

        def score(batch: Batch) -> bytes:
            results = running.score([row for _, row in batch])
            for (line, _), result in zip(batch, results, strict=True):
                summary.tally.add(result.reward, result.status, result.reason, f"line {line}")
            return b"".join(_written(row, result, made.version)
                            for (_, row), result in zip(batch, results, strict=True))

        def count(batch: Batch, record: bytes) -> None:
            summary.num_kept += len(batch)
            for (line, _), raw in zip(batch, record.split(b"\n")[:-1], strict=True):
                row: dict[str, Any] = json.loads(raw)
                summary.tally.add(row["reward"], row["status"], row["reason"], f"line {line}")

        run_job(Job(made_by="megatron-sov score", output=output, items=_batches(source), do=here(score),
                    identity={"input": file_digest(source), "reward": asked.name,
                              "reward_version": made.version, "batch_rows": BATCH_ROWS},
                    sink=lambda journal: journal.write_to(output), known=count,
                    done=lambda batch: progress(len(batch))), redo=redo)
    return summary


def _written(row: Row, result: Result, version: str) -> bytes:
    """Return the line of a row with its reward: what the row had, then what became of it."""
    return json_line({**row, "reward": result.reward, "status": result.status,
                      "components": dict(result.components), "reason": result.reason,
                      "reward_version": version})


def _batches(source: Path) -> Iterator[Batch]:
    rows = read_rows(source)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch
