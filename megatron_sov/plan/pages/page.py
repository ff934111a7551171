"""The page of a plan: what a run takes, where its memory and time go, and the layouts beside its own."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from megatron_sov.base.figures import format_count, format_energy, format_money, format_seconds, format_share
from megatron_sov.base.pages.page import Chapter, Chart, PageSection, PageTable, chart, colour, plain, render
from megatron_sov.model.config import RunConfig
from megatron_sov.plan.pages import quote as quote_tables
from megatron_sov.plan.pages.quote import Quote, QuoteTable, alike, gib, totals
from megatron_sov.plan.pages.telling import PlanText, name, sizes, steps_to_show, timetable_rows
from megatron_sov.plan.search.sweep import SweepResult
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.units import GIB

MAX_POINTS = 2000
"""Layouts of a kind of stage that are drawn: the fastest, and some of the others."""
SEEN_SHARE = 0.02
"""Items of memory that are smaller share a piece of the bar."""
ROW_PX, AROUND_PX = 26, 130
"""Height of a bar, and of what stands around bars."""


def plan_page(config: RunConfig, quotes: Sequence[Quote], told: PlanText | None) -> str:
    sections = [PageSection("Schedule", charts=schedule_charts(config),
                            tables=[schedule_table(config)], side_by_side=True)]
    if quotes:
        sections = [*_priced(quotes), *(_searched(told) if told else []), *sections]
    where = f"{quotes[0].num_gpus:,} x {quotes[0].gpu}: {sizes(config.parallel)}" if quotes else ""
    return render("plan", config.recipe, "", [Chapter(config.recipe, where, _figures(quotes), sections)])


def _figures(quotes: Sequence[Quote]) -> list[tuple[str, str, str]]:
    if not quotes:
        return []
    t = totals(quotes)
    low, high = t.cost_range_usd
    fullest = max(quotes, key=lambda q: q.memory.total_bytes).memory
    asked = f"{format_money(low)} to {format_money(high)}" if high > low else ""
    return [("Days", f"{t.days:,.1f}", f"{format_share(t.effective_share)} of them training"),
            ("Cost", format_money(t.cost_usd), asked),
            ("Energy", format_energy(t.energy_kwh), f"{format_count(t.gpu_hours)} GPU-hours"),
            ("Speed", f"{min(q.tokens_per_s_per_gpu for q in quotes if q.num_gpus):,.0f}",
             "tokens/s/GPU, slowest stage"),
            ("Memory", f"{gib(t.peak_memory_bytes)} GiB",
             f"may take {gib(fullest.limit_bytes)} GiB" if fullest.limit_bytes else "")]


def _priced(quotes: Sequence[Quote]) -> list[PageSection]:
    weights, messages = quote_tables.memory(quotes), quote_tables.traffic(quotes)
    checkpoints = quote_tables.checkpoints(quotes)
    found = [
        PageSection("What it takes", " ".join(quote_tables.notes(quotes)),
                    tables=[_table(quote_tables.stages(quotes))]),
        PageSection("Memory", f"{weights.title}.", charts=[_memory(quotes)], tables=[_table(weights)]),
        PageSection("A step", charts=_steps(quotes), side_by_side=True,
                    tables=[_table(quote_tables.step(quotes))])]
    # jobs that send nothing, or write no checkpoint, have no such table
    return found + [PageSection(table.title, tables=[_table(table)]) for table in (messages, checkpoints)
                    if table.rows]


def _table(table: QuoteTable) -> PageTable:
    return PageTable(table.head, table.rows)


def _memory(quotes: Sequence[Quote]) -> Chart:
    """Return a bar for each kind of stage, in pieces by item, and what may be taken."""
    kinds = alike(quotes, lambda q: (q.memory,))
    figure, labels = go.Figure(), [plain(label) for label in quote_tables.labels(kinds)]
    drawn = [quote_tables.seen(same[0].memory, SEEN_SHARE) for same in kinds]
    names = list(dict.fromkeys(item for items in drawn for item in items))
    for i, item in enumerate(names):
        figure.add_trace(go.Bar(
            y=labels, x=[items.get(item, 0) / GIB for items in drawn], orientation="h",
            name=plain(item.replace("_", " ")), marker={"color": colour(i)}))
    limits = {same[0].memory.limit_bytes for same in kinds} - {0}
    # an engine may take less than a trainer: one line would be wrong for one of them
    limit = limits.pop() if len(limits) == 1 else 0
    if limit:
        figure.add_shape(type="line", x0=limit / GIB, x1=limit / GIB, y0=0, y1=1, yref="paper",
                         line={"color": "var(--ink)", "dash": "dot", "width": 1})
    figure.update_layout(barmode="stack", xaxis={"title": "GiB of the fullest GPU"},
                         yaxis={"autorange": "reversed", "type": "category"})
    said = f"; the line is what a run may take, {gib(limit)} GiB" if limit else ""
    # a legend that takes more than half of the height is cut, and on a phone it has a row for each item
    height_px = max(AROUND_PX + 2 * ROW_PX * len(kinds), 2 * ROW_PX * len(names))
    return chart(figure, f"Memory by item{said}.", height_px=height_px)


def _steps(quotes: Sequence[Quote]) -> list[Chart]:
    """Return for each kind of stage how the parts of a step add up."""
    drawn, kinds = [], alike(quotes, lambda q: (q.seconds,))
    for stages, same in zip(quote_tables.labels(kinds), kinds, strict=True):
        quote = same[0]
        parts = {item: s for item, s in quote.seconds.items() if s >= quote.step_s / 1000}
        labels = [plain(quote_tables.component(item)) for item in parts]
        figure = go.Figure(go.Waterfall(
            orientation="h", y=[*labels, "step"], x=[*parts.values(), 0.0],
            measure=["relative"] * len(parts) + ["total"], increasing={"marker": {"color": colour(0)}},
            totals={"marker": {"color": colour(1)}}, connector={"line": {"color": "var(--rule)"}}))
        figure.update_layout(xaxis={"title": "seconds", "rangemode": "tozero"},
                             yaxis={"autorange": "reversed", "type": "category"})
        drawn.append(chart(figure, f"A step of {stages}: {format_seconds(quote.step_s)}.",
                           height_px=AROUND_PX + ROW_PX * (len(parts) + 1)))
    return drawn


def _searched(told: PlanText) -> list[PageSection]:
    charts = [_points(told, i) for i in range(len(told.search.sweeps))]
    best, *_ = told.search.best
    text = f"{told.lines()[0]}. The fastest: {name(best.choice)}. {told.submit}"
    reasons = PageTable(["why this layout, and why not others"], [[line] for line in told.lines()[1:]])
    return [PageSection("Layouts", text, charts=charts, tables=[_table(told.table()), reasons],
                        side_by_side=True)]


def _points(told: PlanText, kind: int) -> Chart:
    """Return the layouts of a kind of stage by memory and speed."""
    sweep, stages = told.search.sweeps[kind], told.search.names[kind]
    every = -(-len(sweep.ranked) // MAX_POINTS)
    shown = sweep.ranked[::every] if every > 1 else sweep.ranked
    by_recompute: dict[str, list[SweepResult]] = {}
    for found in shown:
        recompute, modules = found.choice.recompute
        by_recompute.setdefault(" + ".join(modules) or ("all layers" if recompute else "nothing"), []).append(
            found)
    figure = go.Figure()
    for i, (words, those) in enumerate(sorted(by_recompute.items())):
        figure.add_trace(_scatter(told, kind, those, f"recomputes {words}", {
            "color": colour(i + 1), "size": 5, "opacity": 0.6}))
    own = next(f for f in sweep.ranked if f.choice == told.search.best[0].choice)
    figure.add_trace(_scatter(told, kind, [own], "chosen", {"color": colour(0), "size": 12,
                                                            "symbol": "diamond"}))
    figure.update_layout(xaxis={"title": "GiB of the fullest GPU"},
                         yaxis={"title": "tokens/s/GPU", "rangemode": "tozero"})
    notes = [f"One in {every} of {len(sweep.ranked):,} is drawn."] if every > 1 else []
    return chart(figure, f"Layouts that fit: memory and speed, stages {stages}.", notes, height_px=380)


def _scatter(told: PlanText, kind: int, found: list[SweepResult], words: str,
             marker: dict[str, object]) -> go.Scatter:
    sweep = told.search.sweeps[kind]
    return go.Scatter(
        x=[round(f.needs_bytes / GIB, 1) for f in found], y=[round(told.speed(sweep, f)) for f in found],
        mode="markers", name=plain(words), marker=marker, text=[plain(name(f.choice)) for f in found],
        hovertemplate="%{text}<br>%{x} GiB, %{y} tokens/s/GPU<extra></extra>")


# The schedule of a run on a page: its schedule_table and its schedule_charts.


CURVE_POINTS = 400
"""Points of a drawn curve, beside those at which something changes."""


def schedule_table(config: RunConfig) -> PageTable:
    body = [[f"{r.step:,}", f"{r.tokens:,}", r.phase, f"{r.samples:,}", f"{r.seq_len:,}", f"{r.lr:.4g}"]
            for r in timetable_rows(config, 1)]
    return PageTable(["step", "tokens", "phase", "samples", "length", "learning rate"], body)


def schedule_charts(config: RunConfig) -> list[Chart]:
    """Return learning rate and tokens of a step over the run, and the blends where phases name them."""
    schedule = Schedule(config)
    steps = steps_to_show(schedule, CURVE_POINTS)
    x = [step + 1 for step in steps]
    rate, size = go.Figure(), go.Figure()
    rate.add_trace(go.Scatter(x=x, y=[schedule.learning_rate(s) for s in steps], name="rate",
                              line={"color": colour(0)}))
    size.add_trace(go.Scatter(x=x, y=[schedule.stretch(s).tokens_per_step for s in steps], name="tokens",
                              line={"color": colour(0), "shape": "hv"}))
    for figure, title in ((rate, "learning rate"), (size, "tokens of a step")):
        figure.update_layout(xaxis={"title": "optimizer step"}, yaxis={"title": title, "rangemode": "tozero"})
        _mark_phases(figure, config, schedule.num_steps)
    found = [chart(rate, "Planned learning rate."),
             chart(size, "Planned tokens of a step: samples times their length.")]
    return found + ([_blend_chart(config)] if any(p.blend for p in config.data.phases) else [])


def _mark_phases(figure: go.Figure, config: RunConfig, num_steps: int) -> None:
    """Shade every second phase and write its name above."""
    starts = [*config.phase_starts(), num_steps]
    for i, phase in enumerate(config.data.phases if len(config.data.phases) > 1 else ()):
        if i % 2:
            figure.add_shape(type="rect", x0=starts[i], x1=starts[i + 1], y0=0, y1=1, yref="paper",
                             fillcolor="var(--band)", line={"width": 0}, layer="below")
        figure.add_annotation(x=(starts[i] + starts[i + 1]) / 2, y=1, yref="paper", yanchor="bottom",
                              text=plain(phase.name), showarrow=False,
                              font={"size": 11, "color": "var(--muted)"})


def _blend_chart(config: RunConfig) -> Chart:
    phases = [p for p in config.data.phases if p.blend]
    figure = go.Figure()
    for i, source in enumerate(dict.fromkeys(source for p in phases for source in p.blend)):
        shares = [100 * p.blend.get(source, 0.0) / sum(p.blend.values()) for p in phases]
        figure.add_trace(go.Bar(y=[plain(p.name) for p in phases], x=shares, name=plain(source),
                                orientation="h", marker={"color": colour(i)}))
    figure.update_layout(barmode="stack", xaxis={"title": "% of samples"},
                         yaxis={"autorange": "reversed", "type": "category"})
    return chart(figure, "Planned blend of each phase.", height_px=150 + 34 * len(phases))
