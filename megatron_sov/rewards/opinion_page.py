"""Two verifiers that disagree, as a page: how often along the rows, with what alarm, on which answers."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from megatron_sov.pages.page import Chapter, Chart, Section, Table, chart, colour, render
from megatron_sov.rewards.opinions import Opinion, Opinions

MAX_POINTS, MIN_OPINIONS = 60, 10
"""Points of the curve at most, and opinions in each at least."""
MAX_ROWS, MAX_CHARS = 40, 300
"""Answers that are shown, and how much of their end."""


def page_of(opinions: Opinions, name: str, version: str) -> str:
    """Return the page's HTML.

    Args:
        opinions: of a file of judged rows.
        name: the file.
        version: of the reward.
    """
    count, wrong = opinions.num_opinions, len(opinions.paid_wrongly)
    rows = [[o.text, f"{o.share_paid:.0%}", f"{o.share_other:.0%}"] for o in opinions.strings()]
    sections = [
        Section("Disagreement along the rows", charts=[_chart(opinions)] if count else [],
                text="Share of answers that the first verifier pays and the second one would not."),
        Section("What gives them away", text="Words that stand in such answers more often than in others.",
                tables=[Table(["words", "in wrongly paid answers", "in others"], rows)] if rows else []),
        Section("Wrongly paid answers", text="The newest ones, by their end.", tables=_answers(opinions))]
    figures = [("Verdict", "ALARM" if opinions.alarm else "no alarm", opinions.told()),
               ("Second opinions", f"{count:,}", ""),
               ("Disagree", f"{len(opinions.disagreeing) / max(1, count):.1%}",
                f"{len(opinions.disagreeing):,} rows"),
               ("Wrongly paid", f"{wrong / max(1, count):.1%}", f"{wrong:,} rows")]
    chapter = Chapter(name, f"reward {version}", figures,
                      [s for s in sections if s.charts or s.tables])
    return render("second opinion", "Where two verifiers disagree", name, [chapter],
                  nothing="No row has a second opinion.")


def _chart(opinions: Opinions) -> Chart:
    wrong = set(opinions.paid_wrongly)
    parts = np.array_split(np.array(opinions.lines),
                           max(1, min(MAX_POINTS, opinions.num_opinions // MIN_OPINIONS)))
    figure = go.Figure(go.Scatter(
        x=[int(part[-1]) for part in parts], mode="lines+markers", name="paid wrongly",
        y=np.array([np.mean([line in wrong for line in part.tolist()]) for part in parts], np.float32),
        line={"color": colour(0), "width": 1.8}))
    if opinions.alarm:
        figure.add_vline(x=opinions.alarm_line, line={"color": colour(1), "dash": "dot"},
                         annotation_text="alarm")
    figure.update_layout(xaxis={"title": "row"}, yaxis={"title": "share", "tickformat": ".0%",
                                                        "rangemode": "tozero"})
    return chart(figure, f"Mean of about {len(parts[0])} opinions at each point.")


def _answers(opinions: Opinions) -> list[Table]:
    def row(one: Opinion) -> list[str]:
        end = one.response[-MAX_CHARS:]
        return [f"{one.line:,}", f"{one.first:g}", f"{one.second:g}",
                end if len(end) == len(one.response) else "… " + end]

    rows = [row(one) for one in list(opinions.paid)[::-1][:MAX_ROWS]]
    return [Table(["line", "first", "second", "answer"], rows)] if rows else []
