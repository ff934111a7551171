"""The gate's decision: from the cells of a needle test and the loss on the short context to
passed, or what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sov.config import GateConfig
from megatron_sov.eval.needle.suite import Cell


@dataclass(frozen=True)
class Verdict:
    """What one check of the gate found."""

    failing_cells: list[Cell]
    """Cells whose whole confidence interval lies below the threshold."""
    failing_rows: list[dict[str, Any]]
    """Rows (kind, language, length) whose accuracy over all depths lies below it."""
    loss: float
    """Held-out loss on the short context, nats per token."""
    loss_limit: float
    """What it may be."""
    threshold: float
    """Accuracy asked for."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Accuracy of every row."""

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be."""
        return not self.failing_cells and not self.failing_rows and self.loss <= self.loss_limit

    def fields(self) -> dict[str, Any]:
        """Return plain values for the event and the report."""
        return {**asdict(self), "judged": self.passed}

    def lines(self) -> list[str]:
        """Return what failed, a line each."""
        said = [f"{_place(r)}: {r['correct']} of {r['samples']} right over all depths = {r['accuracy']:.1%}, "
                f"below {self.threshold:.0%}" for r in self.failing_rows]
        said += [f"{_place(asdict(c))}, depth {c.depth:.0%}: {c.correct} of {c.samples} right, "
                 f"interval {c.interval[0]:.1%} to {c.interval[1]:.1%}, below {self.threshold:.0%}"
                 for c in self.failing_cells]
        if not self.loss <= self.loss_limit:  # a loss that is no number is no pass
            said.append(f"short context: held-out loss {self.loss:.4f} nats per token, "
                        f"above {self.loss_limit:.4f}")
        return said


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['kind']}, {cell['language']}, {cell['length_tokens']:,} tokens"


def decide(cells: Sequence[Cell], loss: float, start_loss: float, gate: GateConfig) -> Verdict:
    """Return the verdict.

    A cell of 20 samples cannot prove 90 %: one that is right 97 % of the time misses two or more in 12 % of
    all tests.  So a single cell fails where its whole interval lies below the threshold, and the samples of a
    row together must reach it.

    Args:
        cells: the test's cells.
        loss: held-out loss on the short context, nats per token.
        start_loss: the same before the first stage.
        gate: threshold and tolerance.
    """
    rows: dict[tuple[str, str, int], list[int]] = {}
    for cell in cells:
        row = rows.setdefault((cell.kind, cell.language, cell.length_tokens), [0, 0])
        row[0] += cell.correct
        row[1] += cell.samples
    described: list[dict[str, Any]] = [
        {"kind": kind, "language": language, "length_tokens": length, "correct": correct, "samples": samples,
         "accuracy": correct / samples} for (kind, language, length), (correct, samples) in rows.items()]
    return Verdict(
        failing_cells=[c for c in cells if c.interval[1] < gate.min_accuracy],
        failing_rows=[r for r in described if r["accuracy"] < gate.min_accuracy],
        loss=loss, loss_limit=start_loss + gate.loss_tolerance_nats, threshold=gate.min_accuracy,
        rows=described)
