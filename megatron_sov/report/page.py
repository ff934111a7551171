"""The report's page: runs -> one HTML file that opens without a network."""

from __future__ import annotations

import time

from megatron_sov import pages
from megatron_sov.obs.figures import duration, figure, large
from megatron_sov.pages.content import Chapter, Table
from megatron_sov.report.run_data import Run
from megatron_sov.report.sections import key_figures, last_value, sections


def render(runs: list[Run], now_s: float | None = None) -> str:
    """Return the HTML of a report on one or more runs, in the given order.

    Args:
        runs: what `read_run` returned for each.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    recipes = list(dict.fromkeys(run.recipe() for run in runs if run.recipe()))
    names = " + ".join(run.name for run in runs)
    chapters = [Chapter(run.name, run.recipe(), key_figures(run), sections(run)) for run in runs]
    return pages.render("Training report", f"{recipes[0]}: {names}" if recipes else names, _subtitle(runs),
                        chapters, overview=("All stages", _summary(runs)) if len(runs) > 1 else None,
                        anchor="run", nothing="This run has recorded nothing yet.", now_s=now_s)


def _subtitle(runs: list[Run]) -> str:
    params, active = runs[-1].start("num_params"), runs[-1].start("num_active_params")
    words = []
    if params:
        words.append(f"A model of {large(params)} parameters")
        if active:
            words[0] += f", {large(active)} of them active for each token"
    last_s = max((a.last_time_s for run in runs for a in run.attempts), default=0.0)
    if last_s > 0:
        words.append(f"last event {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(last_s))}")
    return "; ".join(words) + "." if words else ""


def _summary(runs: list[Run]) -> Table:
    """Return one row for each run: what it was, how long it took, and how it ended."""
    rows = []
    for run in runs:
        loss, bits = run.curve("loss"), run.overall_bits_per_byte
        rows.append([run.name, str(run.config.get("objective", {}).get("name", "–")),
                     f"{int(loss.steps[-1]):,}" if loss else "–", _tokens(run), duration(run.wall_s()),
                     figure(last_value(loss)), figure(last_value(bits)),
                     run.attempts[-1].outcome if run.attempts else "–"])
    return Table(["run", "objective", "steps", "tokens", "wall time", "last loss", "held-out bits per byte",
                  "outcome"], rows)


def _tokens(run: Run) -> str:
    tokens = last_value(run.curve("tokens"))
    return large(tokens) if tokens == tokens else "–"
