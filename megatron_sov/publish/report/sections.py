"""What the report says about one run: key figures and sections.  A section without data is left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import (
    Chart, Exhibit, PageSection, PageTable, chart, colour, colour_bar, plain, tables)
from megatron_sov.model.config import RunConfig, from_dict
from megatron_sov.plan.pages.page import schedule_charts, schedule_table
from megatron_sov.publish.report.charts import (
    BALANCE, LEARNING, PADDING, SPEED, StepLine, beside_charts, expert_chart, heldout_charts, loss_charts,
    loss_unit, meter_charts, needle_charts, plan_chart, step_charts)
from megatron_sov.publish.report.judgements import (
    VERDICTS, accounts_tables, accounts_text, forgetting_tables, forgetting_text, gate_tables, media_exhibits,
    media_tables, passk_charts, passk_tables, round_charts, round_tables)
from megatron_sov.publish.report.run_data import Heldout, Phase, RoutingHistory, Run
from megatron_sov.publish.report.scores import checkpoint_score_charts, score_tables
from megatron_sov.publish.report.steps import last_value
from megatron_sov.publish.report.validations import sample_tables, validation_charts, validation_tables
from megatron_sov.runs.obs import routing
from megatron_sov.runs.obs.figures import number, of_field
from megatron_sov.runs.obs.history import KINDS, Attempt, describe
from megatron_sov.runs.obs.wall_time import CATEGORIES
from megatron_sov.work.clusters.units import GIB

MAX_COLUMNS = 400
"""Steps of one heat map at most."""
SHOWN = (("max_violation", "MaxVio", 0.0, "MaxVio of each layer: 0 is perfect balance."),
         ("entropy", "entropy", 1.0,
          "Entropy of each layer's expert load, as a share of that of an even load."),
         ("dead", "experts", 0.0, "Experts of each layer that got no token in the step."),
         ("bias_spread", "spread", 0.0,
          "Selection biases of each layer: the largest less the smallest. Scores lie in (0, 1)."))
"""Figure of a routing record, what its colours mean, its best value, and the caption."""
MAX_ROWS = 200
MEANINGS = {
    "productive": "optimizer steps that are part of the model",
    "lost": "steps done again after a restart, taken back or refused",
    "evaluation": "held-out loss, needles, gates",
    "saving": "training stood still for a checkpoint",
    "startup": "from the start of the processes to their first step",
    "waiting": "from the last sign of life of one attempt to the start of the next",
}
MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 4000


# The report's section on expert routing: load over the run, by layer and by source, and how selection
# biases drift.


def _expert_charts(run: Run) -> list[Chart]:
    """Return load and balance over layers and steps; nothing for a dense model."""
    charts = [expert_chart(run.expert_load)] if run.expert_load else []
    charts += step_charts([run], BALANCE)
    if run.routing is not None:
        charts += [_history_chart(run.routing, *shown)
                   for shown in SHOWN if run.routing.values[shown[0]].any()]
    by_source = run.expert_load_by_source
    return charts + [expert_chart(load, name) for name, load in by_source.items() if len(by_source) > 1]


def _history_chart(history: RoutingHistory, name: str, title: str, best: float, caption: str) -> Chart:
    """Return the heat map layer x step of one figure; in a long run a column is the worst of some records."""
    every = -(-len(history.steps) // MAX_COLUMNS)
    worst_is_high = best == 0.0
    firsts = np.arange(0, len(history.steps), every)
    values = (np.maximum if worst_is_high else np.minimum).reduceat(history.values[name], firsts, axis=0).T
    steps = history.steps[firsts]
    figure = go.Figure(go.Heatmap(
        z=values.astype(np.float32), x=steps.astype(np.int32), y=[f"{layer}" for layer in history.layers],
        zmin=0 if worst_is_high else None, zmax=None if worst_is_high else 1, reversescale=not worst_is_high,
        colorscale=[[0, "var(--heat0)"], [1, "var(--heat1)"]], colorbar=colour_bar(title),
        hovertemplate="step %{x}, layer %{y}<br>%{z:.4g}<extra></extra>"))
    figure.update_layout(xaxis={"title": "optimizer step"},
                         yaxis={"title": "layer", "type": "category", "autorange": "reversed"})
    notes = [f"Each column is the worst of {every:,} records."] if every > 1 else []
    return chart(figure, caption, notes, height_px=min(640, 150 + 26 * len(history.layers)))


def _expert_tables(run: Run) -> list[PageTable]:
    """Return for each source how its tokens spread over experts, and how far that is from the
    spread of all sources."""
    loads = run.expert_load_by_source
    common = np.mean([load.load for load in loads.values()], axis=0) if loads else 0
    own = {name: np.abs(load.load - common).sum(axis=1) / 2 for name, load in loads.items()}
    return tables(loads, {
        "source": plain, "MaxVio, worst layer": lambda n: f"{routing.max_violation(loads[n].load).max():.3g}",
        "entropy, worst layer": lambda n: f"{routing.load_entropy(loads[n].load).min():.3f}",
        "experts without a token, all layers": lambda n: f"{int(routing.num_dead(loads[n].load).sum()):,}",
        "tokens that other sources would send elsewhere": lambda n: f"{own[n].mean():.1%}",
        "most so in layer": lambda n: f"{loads[n].layers[int(own[n].argmax())]}"})


# The spectrum of a run's checkpoints in the report: pass@k of each in each domain, and the best ones.


def _spectra(run: Run) -> list[PageTable]:
    """Return the tables of `ssp_probe` events; of one probe's folder the newest counts."""
    newest = {str(e.get("output")): e for e in run.of("ssp_probe") if e.get("table")}.values()
    return [table for event in newest for table in _spectrum_tables(event)]


def _spectrum_tables(event: dict[str, Any]) -> list[PageTable]:
    k, domains = event["k"], event["domains"]
    found = {(row["checkpoint"], row["domain"]): row for row in event["table"]}
    best = {(c["checkpoint"], c["domain"]) for c in event["choice"]}
    sizes = {row["domain"]: row["num_prompts"] for row in event["table"]}

    def cell(checkpoint: str, domain: str) -> str:
        estimate = next(e for e in found[checkpoint, domain]["pass_at_k"] if e["k"] == k)
        low, high = map(number, estimate["interval"])
        text = f"{number(estimate['value']):.1%} ({low:.1%} to {high:.1%})"
        return Markup("<strong>{}, best</strong>").format(text) if (checkpoint, domain) in best else text

    return [
        PageTable([f"pass@{k}, {event.get('reward')}, {event.get('samples')} samples",
                   *(f"{domain} ({int(number(sizes[domain])):,} problems)" for domain in domains)],
                  [[f"{c['name']} (merged)" if c["is_merged"] else c["name"],
                    *(cell(c["name"], domain) for domain in domains)] for c in event["checkpoints"]]),
        PageTable(["domain", "best checkpoint", f"pass@{k}", "not told from it by these problems"],
                  [[c["domain"], c["checkpoint"], f"{number(c['value']):.1%}",
                    ", ".join(c["as_good"]) or "none: the choice is clear"] for c in event["choice"]]),
        *tables(event.get("merged") or [], {
            "merged checkpoint": of_field("checkpoint"), "domain": of_field("domain"),
            "against its expert": of_field("expert"), "figure": lambda g: f"pass@{g['k']}",
            "gain": of_field("gain", "+.1%"), "95 % interval": lambda g: " to ".join(
                f"{number(end):+.1%}" for end in g["interval"][:2])})]


# The report's section on what went wrong, and what the run did about it.


def _warning_tables(run: Run) -> list[PageTable]:
    """Return what the run warned of, and the stretches of steps that it passed over as the settings asked."""
    rows = [(int(w.get("step") or 0), str(w.get("text", ""))) for w in run.of("warning")]
    skipped = np.array(run.skipped_steps, dtype=np.int64)
    for stretch in np.split(skipped, np.flatnonzero(np.diff(skipped) > 1) + 1) if len(skipped) else []:
        first, last = int(stretch[0]), int(stretch[-1])
        steps = f"step {first:,} was" if first == last else f"steps {first:,} to {last:,} were"
        rows.append((first, f"{steps} passed over: their samples were drawn and not learned"))
    return [PageTable(["step", "what"], [[f"{step:,}", text] for step, text in sorted(rows)])] if rows else []


def _incident_tables(run: Run) -> list[PageTable]:
    """Return one row for each incident in the order of time."""
    rows = [[f"{int(e.get('step') or 0):,}", KINDS[e["event"]], describe(e)]
            for e in run.incidents[:MAX_ROWS]]
    if len(run.incidents) > MAX_ROWS:
        rows.append(["", "", f"… and {len(run.incidents) - MAX_ROWS:,} more in the run's events"])
    return [PageTable(["step", "incident", "what the run saw and did"], rows)] if rows else []


def _compute_tables(run: Run) -> list[PageTable]:
    """Return the computing time of each process, the slowest first, as it was last measured."""
    measured = run.compute_time or {}
    median_s = number(measured.get("median_s"))
    seconds = sorted((measured.get("seconds") or {}).items(), key=lambda item: -number(item[1]))
    if len(seconds) < 2:
        return []
    rows = [[rank, f"{number(s):.4g}", f"{number(s) / median_s:.2f}",
             "slow" if int(rank) in (measured.get("slow") or []) else ""]
            for rank, s in seconds[:16]]
    return [PageTable([f"process (step {int(measured.get('step') or 0):,})", "seconds of computing in a step",
                       "of the median process", ""], rows)]


# Where a run's wall time went: one bar and its figures.


def _time_tables(run: Run) -> list[PageTable]:
    """Return how long each category took; without a start there is nothing."""
    time = run.wall_time
    if time is None or time.total_s <= 0:
        return []
    rows = [[label, format_duration(time.spent_s[name]), f"{time.spent_s[name] / time.total_s:.1%}",
             MEANINGS[name]]
            for name, label in CATEGORIES.items()]
    return [PageTable(["", "time", "share", "what it is"], rows)]


def _time_charts(run: Run) -> list[Chart]:
    time = run.wall_time
    if time is None or time.total_s <= 0:
        return []
    figure = go.Figure()
    for i, (name, label) in enumerate(CATEGORIES.items()):
        share = 100 * time.spent_s[name] / time.total_s
        figure.add_trace(go.Bar(x=[share], y=[""], orientation="h", name=label, marker={"color": colour(i)},
                                hovertemplate=f"{label}: {share:.1f} %, "
                                              f"{format_duration(time.spent_s[name])}<extra></extra>"))
    figure.update_layout(barmode="stack", xaxis={"title": "% of the wall time", "range": [0, 100]},
                         yaxis={"showticklabels": False})
    caption = (f"Of {format_duration(time.total_s)} since the first start, "
               f"{time.goodput:.1%} moved the model forward.")
    return [chart(figure, caption, height_px=240)]  # on a phone the legend has three rows


# Held-out loss of conversations: their first learned turns beside all later ones, and what is thought
# beside what is called and answered.


def turn_tables(run: Run) -> list[PageTable]:
    """Return a table of the sources whose conversations have more than one learned turn, and one of those
    whose turns are more than answers; of one part alone it would say the same again."""
    of = {"turns of the conversations": {name: h.turns for name, h in run.heldout.items()},
          "what a turn says": {name: h.kinds for name, h in run.heldout.items()}}
    return [table for title, parts in of.items() for table in tables(
        [(name, part, found) for name, of_source in parts.items() if len(of_source) > 1
         for part, found in of_source.items()],
        {"source": lambda row: row[0], title: lambda row: row[1],
         "tokens": lambda row: f"{row[2].num_tokens:,}",
         "first loss": lambda row: format_value(float(row[2].loss.values[0])),
         "last loss": lambda row: format_value(last_value(row[2].loss))})]


# Held-out figures of runs that learn from a teacher or from preferences, before and after.


def _before_and_after(kind: str, count: str, figures: Mapping[str, tuple[str, str]], run: Run
                      ) -> list[PageTable]:
    """Return each source's first and last figures in the events of a kind: title -> field and format."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    # of an older step one may come later, by `megatron-sov eval pairs --run`
    for event in sorted(run.of(kind), key=lambda event: number(event.get("step") or 0)):
        by_source.setdefault(str(event.get("source")), []).append(event)

    def cell(name: str, form: str, at: int) -> Callable[[list[dict[str, Any]]], str]:
        def text(found: list[dict[str, Any]]) -> str:
            value = number(found[at].get(name))
            shown = "–" if math.isnan(value) else format(value, form)
            return f"{shown} (step {number(found[at].get('step')):,.0f})"
        return text

    return tables(by_source.values(), {
        "source": lambda found: str(found[0].get("source")),
        count: lambda found: of_field(count, ",.0f")(found[-1]),
        **{f"{title} {when}": cell(*of, at) for title, of in figures.items()
           for when, at in (("before", 0), ("after", -1))}})


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) of what a reader asks first; figures that the run lacks are left out."""
    found = []
    if run.start("num_params"):
        active = run.start("num_active_params")
        found.append(("Parameters", format_count(run.start("num_params")),
                      f"{format_count(active)} active for each token" if active else ""))
    tokens = last_value(run.curve("tokens"))
    if math.isfinite(tokens):
        loss = run.curve("loss")
        found.append(("Tokens trained", format_count(tokens),
                      f"{int(loss.steps[-1]):,} steps" if loss else ""))
    if run.wall_s() > 0:
        ranks = run.start("num_ranks")
        found.append(("Wall time", format_duration(run.wall_s()),
                      f"{ranks:,} process{'es' if ranks > 1 else ''}" if ranks else ""))
    if run.wall_time is not None and math.isfinite(run.wall_time.goodput):
        found.append(("Effective training time", f"{run.wall_time.goodput:.1%}",
                      "of the time since the first start"))
    speed = run.curve("tokens_per_s")
    if speed and len(speed.finite().steps):
        found.append(("Tokens a second", f"{np.median(speed.finite().values):,.0f}", "median over steps"))
    found += _efficiency_figures(run)
    bits = run.overall_bits_per_byte
    if bits:
        best = int(np.argmin(bits.values))
        found.append(("Best held-out", f"{bits.values[best]:.4f}",
                      f"bits per byte, step {int(bits.steps[best]):,}"))
    final = run.curve("loss")
    if final and math.isfinite(last_value(final)):
        found.append(("Last training loss", f"{last_value(final):.4f}", loss_unit(run)))
    for needle in run.needles[-1:]:
        if needle.get("cells"):
            longest = max(int(c["length_tokens"]) for c in needle["cells"])
            found.append(("Needle score", f"{number(needle.get('score')):.1%}", f"up to {longest:,} tokens"))
    return found


def _efficiency_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return what the steps made of their machine."""
    found = []
    tflops, mfu = run.curve("tflops_per_process"), run.curve("mfu")
    if tflops and len(tflops.finite().steps):
        share = ""
        if mfu and len(mfu.finite().steps):
            share = f", {np.median(mfu.finite().values):.1%} of the peak"
        found.append(("Model TFLOP/s", f"{np.median(tflops.finite().values):.3g}",
                      f"each process, median over steps{share}"))
    memory = run.curve("peak_memory_bytes")
    if memory and math.isfinite(last_value(memory)):
        found.append(("Peak memory", f"{last_value(memory) / GIB:.2f} GiB", "process 0"))
    return found


def sections(run: Run) -> list[PageSection]:
    """Return a run's sections in reading order, without those that have nothing to show."""
    found = [declared.of(run) for declared in SECTIONS.values()]
    return [s for s in found if s.charts or s.tables or s.samples or s.json]


def _plan(run: Run) -> RunConfig | None:
    """Return the settings that say what each step is to do; None for settings of another version."""
    try:
        config = from_dict(run.config) if run.config else None
    except UserError:
        return None
    return None if config is None or config.problems(run.start("num_ranks") or 1) else config


def _plan_charts(run: Run) -> list[Chart]:
    config = _plan(run)
    return [] if config is None else schedule_charts(config)


def _plan_tables(run: Run) -> list[PageTable]:
    config = _plan(run)
    return [] if config is None else [schedule_table(config)]


def _settings(run: Run) -> str:
    return json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else ""


def _beside_tables(run: Run) -> list[PageTable]:
    return tables([b for b in run.evaluations if b.failure], {
        "step": lambda b: f"{b.step:,}", "task": lambda b: b.task,
        "why there is no figure": lambda b: b.failure})


def _provenance_tables(run: Run) -> list[PageTable]:
    return tables(run.provenance, {
        "": lambda p: p.role, "kind": lambda p: p.kind, "artifact": lambda p: p.path,
        "SHA-256 of the manifest": lambda p: Markup("<code>{}</code>").format(p.manifest_sha256)})


def phase_tables(run: Run) -> list[PageTable]:
    """Return what each phase of the curriculum was and did; many are folded."""
    loss, tokens = run.curve("loss"), run.curve("tokens")
    if not run.phases or loss is None:
        return []
    rows = []
    for phase in run.phases:
        inside = loss.values[(loss.steps >= phase.first_step) & (loss.steps <= phase.last_step)]
        if not len(inside):
            continue
        before = tokens.values[tokens.steps < phase.first_step] if tokens else np.empty(0)
        within = tokens.values[tokens.steps <= phase.last_step] if tokens else np.empty(0)
        consumed = format_count(within[-1] - (before[-1] if len(before) else 0)) if len(within) else "–"
        tail = inside[-max(1, len(inside) // 20):]
        total = sum(phase.blend.values())
        blend = (", ".join(f"{name} {weight / total:.0%}" for name, weight in phase.blend.items())
                 if total > 0 else "by size")
        rows.append([phase.name, f"{phase.first_step:,} to {phase.last_step:,}", f"{phase.seq_len_tokens:,}",
                     _batch_sizes(phase), blend, consumed, format_value(float(inside[0])),
                     format_value(float(np.mean(tail)))])
    head = ["phase", "steps", "sample (tokens)", "batch (samples)", "blend", "tokens", "first loss",
            "loss, mean of the last 5 %"]
    return [PageTable(head, rows, fold="phases")] if rows else []


def _batch_sizes(phase: Phase) -> str:
    """Return the samples of a step: one number, or first to last of a ramp."""
    sizes = [f"{n:,}" for n in phase.batch_sizes if n]
    if not sizes:
        return "–"
    return sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _heldout_tables(run: Run) -> list[PageTable]:
    def gain(h: Heldout) -> str:
        bits, baseline = last_value(h.bits_per_byte), h.baseline_bits_per_byte
        return f"{1 - bits / baseline:.1%} fewer" if baseline and math.isfinite(bits) else "–"

    return tables(run.heldout.items(), {
        "source": lambda item: item[0], "tokens": lambda item: f"{item[1].num_tokens:,}",
        "first loss": lambda item: format_value(float(item[1].loss.values[0])),
        "last loss": lambda item: format_value(last_value(item[1].loss)),
        "bits per byte": lambda item: format_value(last_value(item[1].bits_per_byte)),
        "bigram's bits per byte": lambda item: format_value(number(item[1].baseline_bits_per_byte)),
        "bits against the bigram": lambda item: gain(item[1])})


def _checkpoint_tables(run: Run) -> list[PageTable]:
    save_s = [number(c["save_s"]) for c in run.checkpoints if c.get("save_s") is not None]
    if not save_s:
        return []
    stall_s = [number(c.get("stall_s", c["save_s"])) for c in run.checkpoints if c.get("save_s") is not None]
    row = [f"{len(save_s):,}", f"{int(run.checkpoints[-1]['step']):,}",
           format_duration(float(np.mean(save_s))),
           format_duration(max(save_s)), format_duration(float(np.mean(stall_s)))]
    return [PageTable(["checkpoints", "last at step", "mean time to save", "longest",
                       "mean stall of training"],
                      [row])]


def _data_charts(run: Run) -> list[Chart]:
    drawn = plan_chart(run.data_consumed or {})
    return [*([drawn] if drawn else []), *step_charts([run], PADDING)]


def _data_tables(run: Run) -> list[PageTable]:
    consumed = run.data_consumed or {}
    tokens, plan = consumed.get("tokens") or {}, consumed.get("plan") or {}
    rows = []
    for name in dict.fromkeys([*plan, *tokens]):
        got, wanted = number(tokens.get(name, 0)), number(plan.get(name, 0))
        rows.append([name, f"{got:,.0f}", f"{wanted:,.0f}",
                     f"{got / wanted - 1:+.2%}" if wanted else "not planned"])
    if not rows:
        return []
    tables = [PageTable(["source", "tokens consumed", "tokens planned", "difference"], rows)]
    if over_long := consumed.get("over_long"):
        fate = {"cut": "cut", "drop": "left out"}.get(str(consumed.get("over_long_are")), "too long")
        tables.append(PageTable(["source", f"conversations or pairs longer than a sample, {fate}"],
                                [[name, f"{number(count):,.0f}"] for name, count in over_long.items()]))
    return tables


def _samples(run: Run) -> list[dict[str, str]]:
    return [{k: _cut(s.get(k)) for k in ("prompt", "text", "target")} for s in run.samples[:MAX_SAMPLES]]


def _sample_text(run: Run) -> str:
    left_out = len(run.samples) - MAX_SAMPLES
    more = f" {left_out:,} more are in the run's events." if left_out > 0 else ""
    step = int(run.samples[0].get("step") or 0) if run.samples else 0
    return f"What the model wrote at step {step:,}, unedited.{more}"


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    left_out = len(text) - MAX_SAMPLE_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_SAMPLE_CHARACTERS]} … ({left_out:,} more characters)"


def _conversion_tables(run: Run) -> list[PageTable]:
    return [table for conversion in run.of("conversion") for table in tables(conversion.get("checks") or [], {
        f"check of {conversion.get('target') or 'the export'}": of_field("name", none=""),
        "measured": lambda c: measured(c.get("value")), "limit": lambda c: measured(c.get("limit")),
        "result": lambda c: VERDICTS[bool(c.get("passed"))]})]


def measured(value: Any) -> str:
    """Return what a check measured, or its limit; a dash where it has none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt_tables(run: Run) -> list[PageTable]:
    def origin(attempt: Attempt) -> str:
        resumed = attempt.start.get("resumed_from")
        why = f" ({attempt.resume_reason})" if attempt.resume_reason else ""
        return f"{f'from step {resumed}' if resumed else 'from the beginning'}{why}"

    def processes(attempt: Attempt) -> str:
        layout = ", ".join(f"{k} {v}" for k, v in (attempt.start.get("layout") or {}).items())
        return f"{attempt.start.get('num_ranks', '–')}" + (f" ({layout})" if layout else "")

    return tables(enumerate(run.attempts, 1), {
        "": lambda one: str(one[0]),
        "started": lambda one: time.strftime("%Y-%m-%d %H:%M:%S UTC",
                                             time.gmtime(number(one[1].start.get("time_s")))),
        "resumed": lambda one: origin(one[1]), "processes (layout)": lambda one: processes(one[1]),
        "machine": lambda one: machine(one[1].start.get("machine")),
        "last step": lambda one: "–" if one[1].last_step is None else f"{one[1].last_step:,}",
        "time": lambda one: format_duration(one[1].wall_s()), "outcome": lambda one: one[1].outcome})


def machine(value: Any) -> str:
    """Return the machine of a `run_start` in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value or "–")


# The table of sections, in reading order.


def _nothing(run: Run) -> list[Any]:
    return []


def _joined(*parts: Callable[[Run], list[PageTable]]) -> Callable[[Run], list[PageTable]]:
    return lambda run: [table for part in parts for table in part(run)]


@dataclass(frozen=True)
class ReportSection:
    """What a section of the report shows of a run; it is left out where that is nothing."""

    title: str
    text: str | Callable[[Run], str] = ""
    lines: tuple[StepLine, ...] = ()
    """Columns of the step events, a chart each."""
    charts: Callable[[Run], list[Chart]] = _nothing
    tables: Callable[[Run], list[PageTable]] = _nothing
    samples: Callable[[Run], list[dict[str, str]]] = _nothing
    exhibits: Callable[[Run], list[Exhibit]] = _nothing
    json: Callable[[Run], str] = lambda run: ""
    side_by_side: bool = True

    def of(self, run: Run) -> PageSection:
        return PageSection(
            self.title, self.text if isinstance(self.text, str) else self.text(run),
            [*step_charts([run], self.lines), *self.charts(run)], self.tables(run), self.samples(run),
            exhibits=self.exhibits(run), json=self.json(run), side_by_side=self.side_by_side)


SECTIONS = {section.title: section for section in (
    ReportSection("Training loss", charts=loss_charts, tables=phase_tables, side_by_side=False),
    ReportSection("Meters", "What the objective measures beside its loss.", charts=meter_charts),
    ReportSection("Held-out loss", charts=heldout_charts, tables=_joined(_heldout_tables, turn_tables)),
    ReportSection("Held-out pairs", "Pairs right and margin are the training meters, against the reference "
                  "if the method has one. Chosen likelier: the chosen response has the greater "
                  "log-probability per token. A tie counts half.", tables=partial(
                      _before_and_after, "heldout_pairs", "pairs", {
                          "pairs right": ("pairs_right", ".1%"), "margin": ("margin", ".4g"),
                          "chosen likelier than rejected": ("chosen_likelier", ".1%")})),
    ReportSection("Distance from the teacher", "On held-out documents, means over the tokens that are "
                  "learned, in nats: KL(teacher || student), and the divergence that the run learns.",
                  tables=partial(_before_and_after, "heldout_divergence", "tokens", {
                      "KL": ("kl", ".4g"), "learned divergence": ("divergence", ".4g")})),
    ReportSection("Scores", "Tasks of eval lm with 95 % intervals over clusters of items. A published "
                  "figure stands beside a score by the benchmark's name alone: its prompts, examples and "
                  "sampling are its authors', so that a difference is no comparison of models unless both "
                  "were measured in the same way.", charts=checkpoint_score_charts, tables=score_tables),
    ReportSection("Forgetting gate", forgetting_text, tables=forgetting_tables),
    ReportSection("Rounds", "A round is written by a policy, judged, and trained; a group is the responses "
                  "to one prompt.", charts=round_charts, tables=round_tables),
    ReportSection("Validation", "Held-out prompts under the run's own reward (`rl run --validation`); RUN/"
                  "validation is a store of the responses.", charts=validation_charts,
                  tables=validation_tables),
    ReportSection("Samples of responses", "Of the newest rounds that were sampled, unedited.",
                  tables=sample_tables),
    ReportSection("Evaluation beside training", charts=beside_charts, tables=_beside_tables),
    ReportSection("Learning rate and gradient norm", lines=LEARNING),
    ReportSection("Plan: learning rate, batch size, blends",
                  charts=_plan_charts, tables=_plan_tables),
    ReportSection("Plan against what happened", accounts_text, tables=accounts_tables),
    ReportSection("Expert load", "MaxVio is the load of the busiest expert over the fair load, less 1 (arXiv "
                  "2408.15664); 0 is perfect balance. What belongs to a source was counted on its held-out "
                  "documents.", charts=_expert_charts, tables=_expert_tables),
    ReportSection("Speed", lines=SPEED, tables=_checkpoint_tables),
    ReportSection("Data consumed", charts=_data_charts, tables=_data_tables, side_by_side=False),
    ReportSection("Warnings, guards and faults",
                  tables=_joined(_warning_tables, _incident_tables, _compute_tables)),
    ReportSection("Needle in a haystack", "Share of questions about hidden facts that the model answers, by "
                  "the length of the context and their depth in it.",
                  charts=lambda run: [c for n in run.needles if n.get("cells") for c in needle_charts(n)]),
    ReportSection("pass@k", "The probability that of k responses to a prompt one at least is right (pass@k), "
                  "or the most frequent answer (maj@k).", charts=passk_charts, tables=passk_tables),
    ReportSection("From one modality to another", "What was recognised in what the model wrote, drew or "
                  "said, and samples of it; and how often a right candidate is among those that it holds for "
                  "the most probable.", tables=media_tables, exhibits=media_exhibits),
    ReportSection("Spectrum of the checkpoints", "pass@k of each checkpoint in each domain, with 95 % "
                  "intervals over problems; the best single checkpoint of a domain is bold.",
                  tables=_spectra),
    ReportSection("Gate", "A stage is complete when every row of needles (kind, language, length) reaches "
                  "the threshold, no single cell lies below it with its whole confidence interval, and the "
                  "loss on the short context is within its tolerance.", tables=gate_tables),
    ReportSection("Samples", _sample_text, samples=_samples),
    ReportSection("Proof of the conversion", "The exported model against the trained one.",
                  tables=_conversion_tables),
    ReportSection("Where the time went", charts=_time_charts, tables=_time_tables, side_by_side=False),
    ReportSection("Starts, stops and restarts", tables=_attempt_tables),
    ReportSection("Settings", "The resolved settings that the run was started with.", json=_settings),
    ReportSection("Provenance", "An artifact's manifest holds the hashes of all its files, so its own hash "
                  "stands for them.", tables=_provenance_tables),
)}
