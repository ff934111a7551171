"""pass@k in the report: a curve over k for each set of prompts, and what the responses were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_sov.obs.figures import number
from megatron_sov.pages.charts import Chart, chart, colour
from megatron_sov.pages.content import Section, Table


def passk_section(events: list[dict[str, Any]]) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `passk` events; of one set of prompts, reward and step the newest counts.
    """
    found = {(str(e.get("input")), e.get("reward"), e.get("step")): e for e in events
             if e.get("pass_at_k")}
    files = {file for file, *_ in found}
    shared = Counter(map(_file_name, files))
    newest = [{**e, "name": _name(e, shared)} for e in found.values()]
    return Section("pass@k", charts=[_chart(e) for e in newest], tables=[_table(newest)] if newest else [],
                   side_by_side=True, text="The probability that of k responses to a prompt one at least is "
                                           "right (pass@k), or the most frequent answer (maj@k).")


def _file_name(file: str) -> str:
    return file.rpartition("/")[2]


def _name(event: dict[str, Any], shared: Counter[str]) -> str:
    """Return what tells prompts and reward from others: the path where files have one name."""
    file = str(event.get("input"))
    return f"{file if shared[_file_name(file)] > 1 else _file_name(file)}, {event.get('reward')}"


def _step(event: dict[str, Any]) -> str:
    return "–" if event.get("step") is None else f"{int(event['step']):,}"


def _chart(event: dict[str, Any]) -> Chart:
    figure = go.Figure()
    for i, (field, name) in enumerate((("pass_at_k", "pass@k"), ("maj_at_k", "maj@k"))):
        rows = [r for r in event.get(field) or [] if len(r["interval"]) == 2]
        values = np.array([[number(r["k"]), number(r["value"]), *map(number, r["interval"])] for r in rows])
        if not len(values):
            continue
        k, value, low, high = values.T
        figure.add_trace(go.Scatter(
            x=k.astype(np.int32), y=value.astype(np.float32), name=name, mode="lines+markers",
            line={"color": colour(i), "width": 1.8},
            error_y={"type": "data", "symmetric": False, "array": (high - value).astype(np.float32),
                     "arrayminus": (value - low).astype(np.float32), "thickness": 1}))
    figure.update_layout(xaxis={"title": "k", "type": "log", "dtick": "D1"},
                         yaxis={"title": "share of prompts", "tickformat": ".0%", "rangemode": "tozero"})
    return chart(figure, f"{event['name']}, step {_step(event)}: 95 % intervals over "
                         f"{int(number(event.get('num_prompts'))):,} prompts.")


def _table(events: list[dict[str, Any]]) -> Table:
    rows = []
    for event in events:
        first, last = event["pass_at_k"][0], event["pass_at_k"][-1]
        sampling = event.get("sampling") or {}
        rows.append([event["name"], _step(event), f"{int(number(event.get('num_prompts'))):,}",
                     f"{int(number(event.get('num_samples'))):,}",
                     f"{int(number(event.get('num_unscored'))):,}",
                     f"{number(first['value']):.1%} (k = {first['k']})",
                     f"{number(last['value']):.1%} (k = {last['k']})",
                     f"{number(event.get('mean_reward')):.4f}",
                     f"temperature {sampling['temperature']}, top-p {sampling['top_p']}, "
                     f"seed {sampling['seed']}" if sampling else "sampled elsewhere"])
    return Table(["prompts, reward", "step", "prompts", "responses", "without a reward", "pass@k", "at most",
                  "mean reward", "sampling"], rows)
