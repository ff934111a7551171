"""The report's page: runs -> one HTML file that opens without a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
import time

import jinja2
from plotly.offline import get_plotlyjs

from megatron_sov.report.model import Run
from megatron_sov.report.sections import Table, duration, figure, key_figures, large, last_value, sections
from megatron_sov.version import __version__


def render(runs: list[Run], now_s: float | None = None) -> str:
    """Return the HTML of a report on one or more runs, in the given order.

    Text from runs is escaped by the template; a content security policy lets only the file's own two scripts run and
    forbids every load, so that hostile model output stays text even for a reader's browser with a defect elsewhere.

    Args:
        runs: what `read_run` returned for each.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_resource("report.html.j2"))
    plotly_js, draw_js = get_plotlyjs(), _resource("draw.js")
    shown = [_shown(run, i) for i, run in enumerate(runs, 1)]
    recipes = list(dict.fromkeys(run.recipe() for run in runs if run.recipe()))
    names = " + ".join(run.name for run in runs)
    return template.render(
        title=f"{recipes[0]}: {names}" if recipes else names,
        subtitle=_subtitle(runs), runs=shown, summary=_summary(runs) if len(runs) > 1 else None,
        css=_resource("report.css"), plotly_js=plotly_js, draw_js=draw_js,
        script_hashes=f"{_csp_hash(plotly_js)} {_csp_hash(draw_js)}", version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)),
    )


def _resource(name: str) -> str:
    return importlib.resources.files("megatron_sov.report").joinpath("templates", name).read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _shown(run: Run, position: int) -> dict[str, object]:
    anchor = f"run-{position}"
    parts = [{"section": s, "anchor": f"{anchor}-{re.sub('[^a-z]+', '-', s.title.lower())}"} for s in sections(run)]
    return {"name": run.name, "recipe": run.recipe(), "anchor": anchor, "figures": key_figures(run), "parts": parts}


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
        rows.append([run.name, str(run.config.get("objective", {}).get("name", "–")), f"{int(loss.steps[-1]):,}" if loss else "–",
                     _tokens(run), duration(run.wall_s()), figure(last_value(loss)), figure(last_value(bits)),
                     run.attempts[-1].outcome if run.attempts else "–"])
    return Table(["run", "objective", "steps", "tokens", "wall time", "last loss", "held-out bits per byte", "outcome"], rows)


def _tokens(run: Run) -> str:
    tokens = last_value(run.curve("tokens"))
    return large(tokens) if tokens == tokens else "–"
