"""Rounds of reinforcement learning in the report: what was rewarded, how long responses were, how old the
policy was that wrote them, and what became of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.errors import UserError
from megatron_sov.obs.figures import number
from megatron_sov.pages.page import Chart, Section, Table, chart, colour, plain
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.rounds import LEARNS

MAX_CURVES = 12
"""Curves of a chart at most, those with the most responses."""
MAX_ROWS = 40
"""Rounds in the table at most, the newest ones."""


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """Return what the manifests of a run's published rounds say, in order; one that is damaged is left out,
    since it is being written, or `rl train` will name it."""
    found = []
    for file in sorted((run / ROUNDS).glob(f"[0-9]*/{MANIFEST}")):
        try:
            content = read_manifest(file.parent, "tokens").content
        except UserError:
            continue
        if isinstance(content.get("means"), dict) and "round" in content:
            found.append(content)
    return sorted(found, key=lambda content: number(content["round"]))


def round_section(rounds: Sequence[dict[str, Any]]) -> Section:
    """Return the section; of a run without rounds it has no content, and is left out."""
    means = [content["means"] for content in rounds]
    charts = [
        _chart(rounds, {"reward": _values(means, "reward"), **_of_names(means, "components")}, "reward",
               "Mean reward of a round's responses, and the parts that it is made of."),
        _chart(rounds, _of_domains(means), "reward", "Mean reward by domain of the prompts."),
        _chart(rounds, {"tokens": _values(means, "response_tokens")}, "tokens",
               "Mean length of responses, in tokens that the policy wrote."),
        _chart(rounds, {"truncated": _values(means, "truncated")}, "share",
               "Share of responses that were as long as allowed and did not end."),
        _chart(rounds, {"staleness": _values(means, "staleness_steps")}, "optimizer steps",
               "Age of the policy that wrote a token, when its round began to be trained."),
        _chart(rounds, {reason: np.array([number(c.get("groups", {}).get(reason, 0)) for c in rounds])
                        for reason in _reasons(rounds)}, "groups", "What became of each group of responses.")]
    return Section("Rounds", charts=[c for c in charts if c is not None],
                   tables=[_table(rounds)] if rounds else [], side_by_side=True,
                   text="A round is written by a policy, judged, and trained; a group is the responses to "
                        "one prompt.")


def _values(means: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([number(m.get(name)) for m in means])


def _of_names(means: Sequence[dict[str, Any]], field: str,
              of: Callable[[Any], Any] = lambda value: value) -> dict[str, np.ndarray]:
    """Return a curve for each name of a field, those that most rounds have first."""
    counts: dict[str, int] = {}
    for m in means:
        for name in m.get(field) or {}:
            counts[name] = counts.get(name, 0) + 1
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_CURVES]
    return {name: np.array([number(of((m.get(field) or {}).get(name))) for m in means]) for name in kept}


def _of_domains(means: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return _of_names(means, "domains", lambda found: found.get("reward") if isinstance(found, dict) else None)


def _reasons(rounds: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({reason for content in rounds for reason in content.get("groups") or {}})


def _chart(rounds: Sequence[dict[str, Any]], curves: dict[str, np.ndarray], title: str,
           caption: str) -> Chart | None:
    """Draw curves over rounds; None where there is nothing to draw."""
    at = np.array([int(number(content["round"])) for content in rounds], np.int32)
    figure = go.Figure()
    for i, (name, values) in enumerate(curves.items()):
        known = np.isfinite(values)
        if known.any():
            figure.add_trace(go.Scatter(
                x=at[known], y=values[known].astype(np.float32), name=plain(name),
                mode="lines+markers" if len(at) <= 20 else "lines", line={"color": colour(i), "width": 1.8}))
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": "round"}, yaxis={"title": title})
    return chart(figure, caption)


def _table(rounds: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for content in rounds[-MAX_ROWS:]:
        means, groups = content["means"], content.get("groups") or {}
        learns = number(groups.get(LEARNS, 0))
        others = ", ".join(f"{reason} {number(count):,.0f}" for reason, count in sorted(groups.items())
                           if reason != LEARNS)
        unjudged = ", ".join(f"{status} {number(count):,.0f}"
                             for status, count in sorted((content.get("unjudged") or {}).items()))
        rows.append([f"{number(content['round']):,.0f}", f"{number(means.get('responses')):,.0f}",
                     f"{number(means.get('reward')):.4f}", f"{number(means.get('response_tokens')):,.1f}",
                     f"{number(means.get('truncated')):.1%}", f"{learns:,.0f}", others or "–",
                     unjudged or "–", f"{len(content.get('late') or []):,}",
                     f"{len(content.get('late_from') or []):,}"])
    return Table(["round", "judged responses", "mean reward", "mean tokens", "did not end", "groups trained",
                  "groups not trained", "without a reward", "left out as late", "late ones joined"], rows)
