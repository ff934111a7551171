"""Scoring a file of answers: rows in order, batch by batch, kept as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.digests import file_digest
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.registry import Made
from megatron_sov.rewards.reward import Row
from megatron_sov.rewards.rows import read_rows, written
from megatron_sov.rewards.running import runner
from megatron_sov.rewards.tally import Tally
from megatron_sov.work.jobs import Job, here, run_job

BATCH_ROWS = 128
"""Rows that are scored together, and lost at most when the command is killed."""
Batch = list[tuple[int, Row]]
"""Lines of the file, and their rows."""


@dataclass
class Summary:
    """What became of the rows."""

    tally: Tally = field(default_factory=Tally)
    """Of all rows."""
    num_kept: int = 0
    """Rows that an earlier, killed command had scored."""


@dataclass(frozen=True)
class _Kept:
    """The verdict of a row that was scored before."""

    reward: float | None
    status: str
    reason: str


def score_file(asked: Order, made: Made, source: Path, output: Path, workers: int,
               progress: Callable[[int], object], *, redo: bool = False) -> Summary:
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
    summary = Summary()
    with runner(asked, made, workers) as running:

        def score(batch: Batch) -> bytes:
            results = running.score([row for _, row in batch])
            for (line, _), result in zip(batch, results, strict=True):
                summary.tally.add(result, f"line {line}")
            return b"".join(written(row, result, made.version)
                            for (_, row), result in zip(batch, results, strict=True))

        def count(batch: Batch, record: bytes) -> None:
            summary.num_kept += len(batch)
            for (line, _), raw in zip(batch, record.split(b"\n")[:-1], strict=True):
                row: dict[str, Any] = json.loads(raw)
                summary.tally.add(_Kept(row["reward"], row["status"], row["reason"]), f"line {line}")

        run_job(Job(made_by="megatron-sov score", output=output, items=_batches(source), do=here(score),
                    identity={"input": file_digest(source), "reward": asked.name,
                              "reward_version": made.version, "batch_rows": BATCH_ROWS},
                    sink=lambda journal: journal.write_to(output), known=count,
                    done=lambda batch: progress(len(batch))), redo=redo)
    return summary


def _batches(source: Path) -> Iterator[Batch]:
    rows = read_rows(source)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch
