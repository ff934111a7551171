"""The page of a plan: what a run takes, where its memory and time go, and the layouts beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megatron_sov.base.figures import format_count, format_energy, format_money, format_seconds, format_share
from megatron_sov.base.pages.page import Chapter, Chart, PageSection, PageTable, render
from megatron_sov.base.pages.plots import Axis, BarPlot, BarSeries, LinePlot, Series, colour
from megatron_sov.model.config import RunConfig
from megatron_sov.plan.pages import quote as quote_tables
from megatron_sov.plan.pages.quote import Quote, QuoteTable, alike, gib, totals
from megatron_sov.plan.pages.telling import PlanText, name, sizes, steps_to_show, timetable_rows
from megatron_sov.plan.search.sweep import SweepResult
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.units import GIB

MAX_POINTS = 500
"""Layouts of a kind of stage that are drawn: the fastest, and some of the others."""
SEEN_SHARE = 0.02
"""Items of memory that are smaller share a piece of the bar."""


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
    labels = quote_tables.labels(kinds)
    drawn = [quote_tables.seen(same[0].memory, SEEN_SHARE) for same in kinds]
    names = list(dict.fromkeys(item for items in drawn for item in items))
    series = [BarSeries(item.replace("_", " "), [items.get(item, 0) / GIB for items in drawn], colour(i))
              for i, item in enumerate(names)]
    limits = {same[0].memory.limit_bytes for same in kinds} - {0}
    # an engine may take less than a trainer: one line would be wrong for one of them
    limit = limits.pop() if len(limits) == 1 else 0
    said = f"; the line is what a run may take, {gib(limit)} GiB" if limit else ""
    return Chart(BarPlot(labels, series, Axis("GiB of the fullest GPU"), is_stacked=True,
                         rule=limit / GIB if limit else None), f"Memory by item{said}.")


def _steps(quotes: Sequence[Quote]) -> list[Chart]:
    """Return for each kind of stage how the parts of a step add up."""
    drawn, kinds = [], alike(quotes, lambda q: (q.seconds,))
    for stages, same in zip(quote_tables.labels(kinds), kinds, strict=True):
        quote = same[0]
        parts = {item: s for item, s in quote.seconds.items() if s >= quote.step_s / 1000}
        ends = list(accumulate(parts.values(), initial=0.0))
        labels = [*map(quote_tables.component, parts), "step"]
        series = [BarSeries("seconds", [*parts.values(), ends[-1]], starts=[*ends[:-1], 0.0])]
        drawn.append(Chart(BarPlot(labels, series, Axis("seconds")),
                           f"A step of {stages}: {format_seconds(quote.step_s)}."))
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
    series = [_points_series(told, kind, those, f"recomputes {words}", colour(i + 1))
              for i, (words, those) in enumerate(sorted(by_recompute.items()))]
    own = next(f for f in sweep.ranked if f.choice == told.search.best[0].choice)
    series.append(_points_series(told, kind, [own], "chosen", colour(0)))
    note = f"One in {every} of {len(sweep.ranked):,} is drawn." if every > 1 else ""
    return Chart(LinePlot(series, Axis("GiB of the fullest GPU"), Axis("tokens/s/GPU", low=0.0), 320),
                 f"Layouts that fit: memory and speed, stages {stages}.", note)


def _points_series(told: PlanText, kind: int, found: list[SweepResult], words: str, stroke: str) -> Series:
    speeds = [round(told.speed(told.search.sweeps[kind], f)) for f in found]
    sizes_gib = [round(f.needs_bytes / GIB, 1) for f in found]
    notes = [f"{name(f.choice)}: {size} GiB, {speed:,} tokens/s/GPU"
             for f, size, speed in zip(found, sizes_gib, speeds, strict=True)]
    return Series(words, sizes_gib, speeds, stroke, "points", notes=notes)


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
    bands = _phase_bands(config, schedule.num_steps)
    rate = Series("rate", x, [schedule.learning_rate(s) for s in steps])
    size = Series("tokens", x, [schedule.stretch(s).tokens_per_step for s in steps], kind="stairs")
    found = [Chart(LinePlot([series], Axis("optimizer step"), Axis(title, low=0.0), bands=bands), caption)
             for series, title, caption in (
                 (rate, "learning rate", "Planned learning rate."),
                 (size, "tokens of a step", "Planned tokens of a step: samples times their length."))]
    return found + ([_blend_chart(config)] if any(p.blend for p in config.data.phases) else [])


def _phase_bands(config: RunConfig, num_steps: int) -> list[tuple[str, float, float]]:
    """Return name, first step and end of each phase; nothing for a single phase."""
    starts = [*config.phase_starts(), num_steps]
    phases = config.data.phases if len(config.data.phases) > 1 else ()
    return [(phase.name, starts[i], starts[i + 1]) for i, phase in enumerate(phases)]


def _blend_chart(config: RunConfig) -> Chart:
    phases = [p for p in config.data.phases if p.blend]
    series = []
    for i, source in enumerate(dict.fromkeys(source for p in phases for source in p.blend)):
        shares = [p.blend.get(source, 0.0) / sum(p.blend.values()) for p in phases]
        series.append(BarSeries(source, shares, colour(i)))
    return Chart(BarPlot([p.name for p in phases], series, Axis("share of samples", is_share=True),
                         is_stacked=True), "Planned blend of each phase.")
