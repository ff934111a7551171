"""A pipeline's page: what became of the documents of each source, as one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from pydantic import TypeAdapter, ValidationError

from data_prep.curate.journey.facts import BINS, SCORES, Facts, facts_of_output, total
from data_prep.curate.journey.summary import (
    DocumentSample, DroppedCount, JourneySummary, SourceSummary, StepCounts, dropped_by_reason, read_summary)
from data_prep.curate.journey.telling import changes, cut
from megatron_sov.base.artifacts import MANIFEST, read_manifest, write_output
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.figures import format_count, format_duration, format_size
from megatron_sov.base.pages.page import (
    Chapter, Chart, Comparison, PageSection, PageTable, Panel, chart, colour, plain, render as render_page)

# The charts of a pipeline's page.

ROWS = {"autorange": "reversed", "type": "category"}
"""Axis of bars under one another: a label such as 2021 is a name, not a number."""
MAX_BARS = 24
ROW_PX = 22
LABEL_CHARS = 40


def funnel(steps: Sequence[tuple[str, int]], caption: str) -> Chart:
    """Return how many documents of a source each step left, as bars one under another.

    Args:
        steps: (step, documents that it left), the first of which is what was read.
        caption: one sentence below it.
    """
    read = steps[0][1] or 1
    # The first pair is of the reading with itself, which loses nothing.
    lost = [before - left for (_, before), (_, left) in zip([steps[0], *steps], steps, strict=False)]
    names = [short(name) for name, _ in steps]
    figure = go.Figure([
        _bar(names, [left for _, left in steps], "kept", colour(0),
             [f"{left:,} ({left / read:.1%})" for _, left in steps]),
        _bar(names, lost, "dropped by this step", colour(1), ["" for _ in steps])])
    figure.update_layout(barmode="stack", bargap=0.25, yaxis=ROWS, legend={"traceorder": "normal"},
                         xaxis={"title": "documents", "range": [0, 1.02 * read], "nticks": 5})
    return chart(figure, caption, height_px=130 + ROW_PX * len(steps))


def bars(counts: Mapping[str, float], title: str, caption: str, note: str = "",
         order: Sequence[str] = (), said: Callable[[float], str] = lambda n: f"{n:,.6g}") -> Chart:
    """Return one bar for each value, the largest first, or in an order of one's own.

    Args:
        counts: value -> how much of it there is.
        title: what is counted, for the axis.
        caption: one sentence below it.
        note: what else is to be known.
        order: values that stand first, in this order; the others follow by size.
        said: how a bar's length is written on it.
    """
    ranked = [v for v in order if v in counts]
    ranked += sorted((v for v in counts if v not in ranked), key=lambda v: (-counts[v], v))
    left_out = len(ranked) - MAX_BARS
    notes = [note, f"{left_out:,} smaller ones are not drawn." if left_out > 0 else ""]
    shown = ranked[:MAX_BARS]
    figure = go.Figure([_bar(_apart(shown), [counts[v] for v in shown], title, colour(0),
                             [said(counts[v]) for v in shown])])
    most = max((counts[v] for v in shown), default=1) or 1
    figure.update_layout(bargap=0.25, yaxis=ROWS,
                         xaxis={"title": plain(title), "range": [0, 1.25 * most], "nticks": 5})
    return chart(figure, caption, notes, height_px=100 + ROW_PX * len(shown))


def histogram(parts: Sequence[int], low: float, high: float, title: str, caption: str,
              note: str = "") -> Chart:
    """Return how many documents lie in each of equal parts between two values."""
    width = (high - low) / len(parts)
    figure = go.Figure(go.Bar(x=[low + (i + 0.5) * width for i in range(len(parts))], y=list(parts),
                              width=width * 0.92, marker={"color": colour(0)}))
    figure.update_layout(bargap=0, xaxis={"title": plain(title), "range": [low, high]},
                         yaxis={"title": "documents"})
    return chart(figure, caption, [note], height_px=240)


def stacked(rows: Mapping[str, Mapping[str, float]], title: str, caption: str) -> Chart:
    """Return one bar for each row, divided by its values: row -> value -> share."""
    names = list(rows)[:MAX_BARS]
    values = sorted({v for row in rows.values() for v in row},
                    key=lambda v: (-sum(row.get(v, 0) for row in rows.values()), v))
    # Readers can distinguish seven colours; all other values share the eighth.
    drawn, rest = values[:7], values[7:]
    figure = go.Figure([_bar(_apart(names), [rows[n].get(v, 0) for n in names], _named(v), colour(i),
                             ["" for _ in names]) for i, v in enumerate(drawn)])
    if rest:
        figure.add_trace(_bar(_apart(names), [sum(rows[n].get(v, 0) for v in rest) for n in names],
                              f"{len(rest)} others", colour(7), ["" for _ in names]))
    figure.update_layout(barmode="stack", bargap=0.25, yaxis=ROWS, legend={"traceorder": "normal"},
                         xaxis={"title": plain(title), "nticks": 5})
    return chart(figure, caption, height_px=130 + ROW_PX * len(names))


def short(text: object, chars: int = LABEL_CHARS) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= chars else f"{line[:chars - 1]}…"


def _bar(names: Sequence[str], values: Sequence[float], name: str, fill: str, texts: Sequence[str]) -> go.Bar:
    style: dict[str, Any] = {"marker": {"color": fill}, "textposition": "auto", "textangle": 0,
                             "cliponaxis": False}
    return go.Bar(y=[plain(n) for n in names], x=list(values), orientation="h", name=plain(short(name)),
                  text=list(texts), **style)


def _named(value: str) -> str:
    return value or "(none)"


def _apart(values: Sequence[str]) -> list[str]:
    """Return labels that differ where values do: those with the same beginning get their number."""
    # Bars with one label would be drawn over each other.
    labels = [short(_named(v)) for v in values]
    return [f"{label} #{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


# What a step that looks at all documents found, as it wrote it for the page: SHARED/report.json.

REPORT = "report.json"
MAX_BYTES = 8 * 2**20
MAX_FINDINGS = 200
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class FoundTable:
    """A table of a step's findings."""

    title: str
    """What it lists."""
    head: list[str]
    """Names of its columns."""
    rows: list[list[Cell]] = field(default_factory=list)
    """Cells in the order of the columns."""


@dataclass(frozen=True)
class FoundBars:
    """Counts of a step's findings, one bar each."""

    title: str
    """What is counted."""
    labels: list[str]
    """One for each bar, in order."""
    counts: list[float]
    """Length of each bar."""
    note: str = ""
    """What else is to be known."""


@dataclass(frozen=True)
class Findings:
    """A step's report.json."""

    tables: list[FoundTable] = field(default_factory=list)
    """Shown below the charts."""
    bars: list[FoundBars] = field(default_factory=list)
    """A chart each."""
    notes: list[str] = field(default_factory=list)
    """Sentences, shown first."""


def findings_sections(out: Path, summary: JourneySummary) -> list[PageSection]:
    """Return a section for each step that left findings; one whose file is damaged says so."""
    found = []
    for shared in summary.shared:
        file, title = out / shared.folder / REPORT, f"{shared.number:02d} {shared.kind}"
        if not file.is_file():
            continue
        try:
            # A step of a user's own may have written this file: it may hold anything, and must not keep the
            # page from being written.
            if file.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has {file.stat().st_size:,} bytes, at most {MAX_BYTES:,} are shown")
            found.append(_section(title, TypeAdapter(Findings).validate_json(file.read_bytes())))
        except ValidationError as e:
            first = e.errors()[0]
            found.append(PageSection(title, f"{file.name} cannot be shown: "
                                            f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
        except (OSError, ValueError) as e:
            found.append(PageSection(title, f"{file.name} cannot be shown: {e}"))
    return found


def _section(title: str, findings: Findings) -> PageSection:
    charts = []
    for one in findings.bars:
        counts = dict(zip(map(visible, one.labels), one.counts, strict=False))
        if counts:
            charts.append(bars(counts, "", f"{one.title}.", one.note, order=list(counts)))
    tables = []
    for table in findings.tables:
        rows = [[_cell(c) for c in row] for row in table.rows[:MAX_FINDINGS]]
        if len(table.rows) > MAX_FINDINGS:
            rows.append([f"… {len(table.rows) - MAX_FINDINGS:,} more rows"])
        tables.append(PageTable([f"{table.title}: {table.head[0]}" if table.head else table.title,
                                 *table.head[1:]], rows))
    return PageSection(title, visible(" ".join(findings.notes)), charts, tables)


def _cell(value: Cell) -> str:
    # Before the numbers: a truth value is an `int` to Python.
    if isinstance(value, bool) or value is None:
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else visible(value)


MAX_REASONS = 40
MAX_PAIRS = 3
"""Samples shown of one step, side by side."""
SAMPLE_CHARS = 1_000
REPORT_HTML = "report.html"
MAX_CHAPTERS = 30
"""Sources with a chapter of their own, the largest ones; the tables have all."""
BYTES_PER_TOKEN = 4.0
"""Assumed where nothing was packed: what byte-level tokenizers of 100,000 words and more reach on English."""
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
LEVELS = ("basic", "L1", "L2", "L3")
MAX_ROWS = 40
NOT_SAID = "(none)"


# A source's chapter of the page: its funnel, why documents were dropped, and examples of each step.


def source_chapter(source: SourceSummary) -> Chapter:
    read, last = source.read, source.last
    figures = [("Read", format_count(read.documents_kept),
                f"documents, {format_size(read.bytes_kept)} of text"),
               ("Kept", format_count(last.documents_kept),
                f"documents, {format_size(last.bytes_kept)} of text"),
               ("Share kept", _share(last.documents_kept, read.documents_kept), "of documents"),
               ("Quarantine", f"{sum(source.quarantine.values()):,}", "files and records not taken")]
    told = [f"Read from {', '.join(source.path)}" if source.path else "",
            f"as {source.format}" if source.format else "",
            f"licence {source.licence}" if source.licence else "no licence recorded",
            "synthetic" if source.synthetic else "", f"kind {source.kind}" if source.kind else ""]
    steps = [(step.name, step.documents_kept) for step in source.steps]
    sections = [PageSection("Step by step", f"{', '.join(filter(None, told))}.",
                            [funnel(steps, f"Documents of {source.name} behind each step.")],
                            [_steps(source.steps)])]
    if dropped := dropped_by_reason(source.steps):
        sections.append(PageSection("Dropped", tables=[reasons_table(dropped)]))
    if source.quarantine:
        sections.append(PageSection("Quarantine", tables=[PageTable(["code", "files and records"], [
            [code, f"{n:,}"] for code, n in sorted(source.quarantine.items(), key=lambda item: -item[1])])]))
    if examples := [one for step in source.steps[1:] for one in _examples(step)]:
        sections.append(PageSection("Examples", "Drawn by a hash of the ids, the beginning of each; "
                                    "sov-data inspect OUT --id ID shows a document's whole way.",
                                    comparisons=examples))
    return Chapter(source.name, source.format, figures, sections)


def reasons_table(dropped: Mapping[tuple[str, str], DroppedCount]) -> PageTable:
    rows = [[step, reason, f"{lost.documents:,}", format_size(lost.bytes)]
            for (step, reason), lost in list(dropped.items())[:MAX_REASONS]]
    if len(dropped) > MAX_REASONS:
        rows.append([f"… {len(dropped) - MAX_REASONS:,} more reasons", "", "", ""])
    return PageTable(["step", "reason", "documents", "text"], rows)


def _steps(steps: Iterable[StepCounts]) -> PageTable:
    return PageTable(["step", "documents in", "kept", "changed", "text kept", "share kept"], [
        [step.name, f"{step.documents_in:,}", f"{step.documents_kept:,}", f"{step.documents_changed:,}",
         format_size(step.bytes_kept), _share(step.documents_kept, step.documents_in)] for step in steps])


def _examples(step: StepCounts) -> list[Comparison]:
    found = []
    kept = [_shown("kept", sample) for sample in step.samples.kept[:MAX_PAIRS]]
    for i, sample in enumerate(step.samples.dropped[:MAX_PAIRS]):
        beside = kept[i] if i < len(kept) else ("kept", "(no other)")
        found.append(Comparison("kept, and dropped", [beside, _shown(f"dropped: {sample.reason}", sample)],
                                step.name))
    for sample in step.samples.changed[:MAX_PAIRS]:
        after = sample.after or ""
        differs = "\n".join(changes(sample.before, after, max_lines=12))
        texts = [("before", cut(sample.before, SAMPLE_CHARS)), ("after", cut(after, SAMPLE_CHARS)),
                 ("what differs", differs or "the change lies behind what is shown")]
        found.append(Comparison(f"changed, {sample.id}", [(who, visible(text)) for who, text in texts],
                                step.name))
    return found


def _shown(fate: str, sample: DocumentSample) -> tuple[str, str]:
    text = visible(cut(sample.before or sample.after or "", SAMPLE_CHARS))
    return f"{fate} · {sample.id}", text or "(empty)"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def write_report(out: Path, file: Path | None = None) -> Path:
    """Write the page of a run's output.

    Args:
        out: what `sov-data run` wrote.
        file: the page; None: OUT/report.html.

    Raises:
        UserError: there is no summary, a shard is damaged, or the disk refuses.
    """
    file = file or out / REPORT_HTML
    write_output(file, render(out))
    return file


def render(out: Path, now_s: float | None = None) -> str:
    """Return the page's HTML.

    Args:
        out: what `sov-data run` wrote.
        now_s: Unix time to print as the time of writing; the current one by default.

    Raises:
        UserError: there is no summary, or a shard is damaged.
    """
    summary, facts = read_summary(out), facts_of_output(out)
    whole, ratio = total(facts.values()), bytes_per_token(out)
    largest = sorted(summary.sources, key=lambda s: -s.read.bytes_kept)[:MAX_CHAPTERS]
    chapters = [Chapter("All sources", "", _figures(summary, whole, ratio), _overall(summary))]
    if whole.num_documents:
        chapters.append(Chapter("Output", f"{format_size(whole.num_bytes)} of text", [],
                                _output(facts, whole)))
    if found := findings_sections(out, summary):
        chapters.append(Chapter("What steps found", "over all documents", [], found))
    chapters += [source_chapter(source) for source in summary.sources if source in largest]
    return render_page("Data report", summary.name, _subtitle(summary, whole), chapters,
                       opening=_opening(summary, whole, ratio), anchor="part",
                       nothing="Nothing was read.", now_s=now_s)


def bytes_per_token(out: Path) -> float | None:
    """Return the bytes of text for each token of what the run packed; None where it packed nothing."""
    if not (out / "tokens" / MANIFEST).is_file():
        return None
    try:
        splits = [split for source in read_manifest(out / "tokens", "tokens").content["sources"]
                  for split in source["splits"].values()]
        return float(sum(s["num_bytes"] for s in splits) / sum(s["num_tokens"] for s in splits))
    except (UserError, KeyError, TypeError, ZeroDivisionError):
        return None


def tokens_said(num_bytes: int, ratio: float | None) -> tuple[str, str]:
    """Return about how many tokens a text has, and how that is known."""
    told = (f"at {ratio:.2f} bytes a token, as packed" if ratio
            else f"assumed: {BYTES_PER_TOKEN:g} bytes a token; nothing is packed")
    about = format_count(num_bytes / (ratio or BYTES_PER_TOKEN)).replace(" ", "\u00a0")
    return f"≈\u00a0{about}", told


def _subtitle(summary: JourneySummary, whole: Facts) -> str:
    read = sum(s.read.documents_kept for s in summary.sources)
    sources = "1 source" if len(summary.sources) == 1 else f"{len(summary.sources)} sources"
    return (f"{sources}, {read:,} documents read; {whole.num_documents:,} in the output, "
            f"{format_size(whole.num_bytes)} of text.")


def _opening(summary: JourneySummary, whole: Facts, ratio: float | None) -> list[Panel]:
    read = [s.read for s in summary.sources]
    tokens, _ = tokens_said(whole.num_bytes, ratio)
    facts = [("Sources", f"{len(summary.sources):,}"),
             ("Documents read", f"{sum(s.documents_kept for s in read):,}"),
             ("Text read", format_size(sum(s.bytes_kept for s in read))),
             ("Documents in the output", f"{whole.num_documents:,}"),
             ("Text in the output", format_size(whole.num_bytes)),
             ("Tokens, assumed" if ratio is None else "Tokens, as packed", tokens),
             ("Not taken (quarantine)", f"{sum(sum(s.quarantine.values()) for s in summary.sources):,}")]
    worst = list(dropped_by_reason(step for s in summary.sources for step in s.steps).items())[:6]
    return [Panel("What was read, and kept", 4, facts),
            Panel("Where documents went", 8, charts=[_whole_funnel(summary)]),
            Panel("Mostly dropped for", 12, tables=[reasons_table(dict(worst))])]


def _whole_funnel(summary: JourneySummary) -> Chart:
    """Draw all sources together; one that a step passes by has what it had before."""
    # Every source goes through its own steps: the bar of a step counts all sources, also those it passes by.
    left = {s.name: s.read.documents_kept for s in summary.sources}
    steps = []
    for number, kind in summary.steps():
        for source in summary.sources:
            left[source.name] = next((step.documents_kept for step in source.steps if step.number == number),
                                     left[source.name])
        steps.append((f"{number:02d} {kind}", sum(left.values())))
    return funnel(steps, "Documents of all sources behind each step.")


def _figures(summary: JourneySummary, whole: Facts, ratio: float | None) -> list[tuple[str, str, str]]:
    steps = [step for source in summary.sources for step in source.steps]
    cpu_s = sum(step.cpu_s for step in steps) + sum(shared.cpu_s for shared in summary.shared)
    read_bytes = sum(s.read.bytes_kept for s in summary.sources)
    tokens, how = tokens_said(whole.num_bytes, ratio)
    return [("Text kept", f"{whole.num_bytes / read_bytes:.1%}" if read_bytes else "–",
             f"{format_size(whole.num_bytes)} of {format_size(read_bytes)}"),
            ("Tokens", tokens, how),
            ("Processor time", format_duration(cpu_s), "of all steps and sources"),
            ("Per terabyte of text", f"{cpu_s / 3600 / (read_bytes / 1e12):,.0f}" if read_bytes else "–",
             "core-hours, at this run's speed")]


def _overall(summary: JourneySummary) -> list[PageSection]:
    dropped = dropped_by_reason(step for s in summary.sources for step in s.steps)
    by_reason = {f"{step}: {reason}": float(lost.documents) for (step, reason), lost in dropped.items()}
    rows = [[s.name, s.format or "–", s.licence or "not recorded", f"{s.num_files:,}",
             format_size(s.raw_bytes),
             f"{s.read.documents_kept:,}", f"{s.last.documents_kept:,}", format_size(s.last.bytes_kept),
             f"{s.last.documents_kept / s.read.documents_kept:.1%}" if s.read.documents_kept else "–",
             f"{sum(s.quarantine.values()):,}"] for s in summary.sources]
    sections = [PageSection("Sources", tables=[PageTable(
        ["source", "format", "licence", "files", "on disk", "documents read", "kept", "text kept", "share",
         "quarantine"], rows)])]
    if by_reason:
        sections.append(PageSection("Reasons", charts=[
            bars(by_reason, "documents", "Documents that were dropped, by step and reason.")],
            tables=[reasons_table(dict(dropped))]))
    if codes := _quarantine(summary):
        sections.append(PageSection("Quarantine", "Files and records that could not be read, or are not "
                                    "wanted; quarantine/SOURCE.jsonl has the place of each.", tables=[codes]))
    return [*sections, _times(summary), PageSection("Settings", "Of every step, as the run resolved them.",
                                                    json=(
        json.dumps({f"{n:02d} {kind}": summary.of_step(n)[0].settings for n, kind in summary.steps()},
                   indent=1, ensure_ascii=False)))]


def _quarantine(summary: JourneySummary) -> PageTable | None:
    rows = [[s.name, code, f"{n:,}"] for s in summary.sources for code, n in sorted(s.quarantine.items())]
    return PageTable(["source", "code", "files and records"], rows) if rows else None


def _times(summary: JourneySummary) -> PageSection:
    rows = []
    for number, kind in summary.steps():
        done = summary.of_step(number)
        passes = [shared for shared in summary.shared if shared.number == number]
        cpu_s = sum(step.cpu_s for step in done) + sum(one.cpu_s for one in passes)
        wall_s = sum(step.wall_s for step in done) + sum(one.wall_s for one in passes)
        in_bytes = sum(s.bytes_in for s in done)
        in_documents = sum(s.documents_in for s in done)
        rows.append([f"{number:02d} {kind}", f"{in_documents:,}", format_size(in_bytes),
                     format_duration(cpu_s),
                     format_duration(wall_s),
                     f"{in_bytes / 1e6 / cpu_s:.3g}" if cpu_s else "–",
                     f"{in_documents / cpu_s:,.0f}" if cpu_s else "–"])
    return PageSection("Time", "Processor time of all shards together; speeds are those of one core.",
                       tables=[PageTable(["step", "documents in", "text in", "processor time",
                                          "sum over shards", "MB/s", "documents/s"], rows)])


def _output(facts: dict[str, Facts], whole: Facts) -> list[PageSection]:
    found = [PageSection("Languages and levels", side_by_side=True, charts=[
        *_bars_of(whole, "language", "language", "Text of the output by language."),
        *_bars_of(whole, "level", "level", "Text of the output by level.", LEVELS),
        *_bars_of(whole, "kind", "kind", "Text of the output by kind."),
        *_bars_of(whole, "topic", "topic", "Text of the output by topic cluster.")])]
    by_output = {name: {v: float(n[1]) for v, n in one.values.get("language", {}).items()}
                 for name, one in facts.items()}
    if len(facts) > 1 and any(by_output.values()):
        found.append(PageSection("Languages of each output source", charts=[
            stacked(by_output, "bytes of text", "Text by language in each source of the output.")]))
    histograms = [histogram(whole.scores[name][:BINS], *SCORES[name], name, f"Documents by {name}.",
                            f"{whole.scores[name][BINS]:,} have none." if whole.scores[name][BINS] else "")
                  for name in SCORES if name in whole.scores]
    if histograms:
        found.append(PageSection("Scores", charts=histograms, side_by_side=True))
    tables = [PageTable(["output", "documents", "text"], [
        [name, f"{one.num_documents:,}", format_size(one.num_bytes)] for name, one in facts.items()]),
        *_value_tables(whole)]
    return [found[0], *found[1:], PageSection("Counts", tables=tables)]


def _bars_of(whole: Facts, column: str, what: str, caption: str,
             order: tuple[str, ...] = ()) -> list[Chart]:
    counts = {value: n[1] for value, n in whole.values.get(column, {}).items()}
    if not counts or set(counts) == {""}:
        return []
    # One unit for all bars, chosen by the longest: the axis has plain numbers.
    unit_bytes, unit = next((u for u in UNITS if max(counts.values()) >= u[0]), UNITS[-1])
    scaled = {value: n / unit_bytes for value, n in counts.items()}
    return [bars(scaled, f"{unit} of text, by {what}", caption, order=order,
                 said=lambda n: format_size(n * unit_bytes))]


def _value_tables(whole: Facts) -> list[PageTable]:
    licences = whole.values.get("licence", {})
    tables = [_ranked("licence", licences), _ranked("host", {h: n for h, n in whole.hosts.items() if h})]
    years: dict[str, int] = {}
    for month, n in whole.months.items():
        years[month[:4]] = years.get(month[:4], 0) + n
    if set(years) - {""}:
        tables.append(PageTable(["year of the document", "documents"], [
            [year or NOT_SAID, f"{n:,}"] for year, n in sorted(years.items())][-MAX_ROWS:]))
    tables += [PageTable([column, "count"], [[name, f"{n:,}"] for name, n in sorted(sums.items())][:MAX_ROWS])
               for column, sums in whole.named.items() if sums]
    return [table for table in tables if table.rows]


def _ranked(what: str, counts: dict[str, list[int]]) -> PageTable:
    ranked = sorted(counts.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [[value or NOT_SAID, f"{n[0]:,}", format_size(n[1])] for value, n in ranked[:MAX_ROWS]]
    if len(ranked) > MAX_ROWS:
        rows.append([f"… {len(ranked) - MAX_ROWS:,} more", "", ""])
    return PageTable([what, "documents", "text"], rows)
