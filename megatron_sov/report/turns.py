"""Held-out loss of conversations, their first learned turns beside all later ones."""

from __future__ import annotations

from megatron_sov.obs.figures import figure
from megatron_sov.pages.content import Table
from megatron_sov.report.run_data import Run
from megatron_sov.report.steps import last_value


def turn_tables(run: Run) -> list[Table]:
    """Return the table of the sources whose conversations have more than one learned turn."""
    rows = [[name, part, f"{turn.num_tokens:,}", figure(float(turn.loss.values[0])),
             figure(last_value(turn.loss))]
            for name, heldout in run.heldout.items() if len(heldout.turns) > 1
            for part, turn in heldout.turns.items()]
    head = ["source", "turns of the conversations", "tokens", "first loss", "last loss"]
    return [Table(head, rows)] if rows else []
