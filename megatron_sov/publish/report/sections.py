"""What the report says about one run: key figures and sections.  A section without data is left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_duration, format_share, format_value
from megatron_sov.base.pages.page import Chart, Exhibit, PageSection, PageTable, tables
from megatron_sov.base.settings import by_name
from megatron_sov.publish.report.charts import (
    BALANCE, LEARNING, SPEED, StepLine, beside_charts, expert_chart, heldout_charts, loss_charts, loss_unit,
    meter_charts, needle_charts, step_charts)
from megatron_sov.publish.report.judgements import (
    VERDICTS, accounts_tables, accounts_text, forgetting_tables, forgetting_text, gate_tables, media_exhibits,
    media_tables, passk_charts, passk_tables, round_charts, round_tables)
from megatron_sov.publish.report.run_data import Heldout, Phase, Run
from megatron_sov.publish.report.scores import checkpoint_score_charts, score_tables
from megatron_sov.publish.report.steps import last_value
from megatron_sov.publish.report.validations import sample_tables, validation_charts, validation_tables
from megatron_sov.runs.obs import routing
from megatron_sov.runs.obs.figures import number, of_field
from megatron_sov.runs.obs.history import KINDS, Attempt, describe
from megatron_sov.runs.obs.wall_time import CATEGORIES
from megatron_sov.work.clusters.units import GIB

MAX_ROWS = 200
MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 2000


# The report's section on expert routing: the last load, by layer and by source.


def _expert_charts(run: Run) -> list[Chart]:
    """Return the last load and the balance over the steps; nothing for a dense model."""
    return [*([expert_chart(run.expert_load)] if run.expert_load else []), *step_charts([run], BALANCE)]


def _expert_tables(run: Run) -> list[PageTable]:
    """Return for each source how its tokens spread over experts, and how far that is from the
    spread of all sources."""
    loads = run.expert_load_by_source
    common = np.mean([load.load for load in loads.values()], axis=0) if loads else 0
    own = {name: np.abs(load.load - common).sum(axis=1) / 2 for name, load in loads.items()}
    return tables(loads, {
        "source": str, "MaxVio, worst layer": lambda n: f"{routing.max_violation(loads[n].load).max():.3g}",
        "entropy, worst layer": lambda n: f"{routing.load_entropy(loads[n].load).min():.3f}",
        "experts without a token, all layers": lambda n: f"{int(routing.num_dead(loads[n].load).sum()):,}",
        "tokens that other sources would send elsewhere": lambda n: format_share(own[n].mean()),
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
        text = f"{format_share(number(estimate['value']))} ({format_share(low)} to {format_share(high)})"
        return Markup("<strong>{}, best</strong>").format(text) if (checkpoint, domain) in best else text

    return [
        PageTable([f"pass@{k}, {event.get('reward')}, {event.get('samples')} samples",
                   *(f"{domain} ({int(number(sizes[domain])):,} problems)" for domain in domains)],
                  [[f"{c['name']} (merged)" if c["is_merged"] else c["name"],
                    *(cell(c["name"], domain) for domain in domains)] for c in event["checkpoints"]]),
        PageTable(["domain", "best checkpoint", f"pass@{k}", "not told from it by these problems"],
                  [[c["domain"], c["checkpoint"], format_share(number(c['value'])),
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


def _time_text(run: Run) -> str:
    time = run.wall_time
    if time is None or time.total_s <= 0:
        return ""
    return (f"{format_share(time.goodput)} of {format_duration(time.total_s)} since the first start moved "
            "the model forward.")


def _time_tables(run: Run) -> list[PageTable]:
    """Return how long each category took; without a start there is nothing."""
    time = run.wall_time
    if time is None or time.total_s <= 0:
        return []
    rows = [[label, format_duration(time.spent_s[name]), format_share(time.spent_s[name] / time.total_s)]
            for name, label in CATEGORIES.items()]
    return [PageTable(["", "time", "share"], rows)]


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


def _before_and_after(kind: str, count: str, figures: Mapping[str, tuple[str, Callable[[float], str]]],
                      run: Run) -> list[PageTable]:
    """Return each source's first and last figures in the events of a kind: title -> field and format."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    # of an older step one may come later, by `megatron-sov eval pairs --run`
    for event in sorted(run.of(kind), key=lambda event: number(event.get("step") or 0)):
        by_source.setdefault(str(event.get("source")), []).append(event)

    def cell(name: str, form: Callable[[float], str], at: int) -> Callable[[list[dict[str, Any]]], str]:
        def text(found: list[dict[str, Any]]) -> str:
            shown = form(number(found[at].get(name)))
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
        found.append(("Effective training time", format_share(run.wall_time.goodput),
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
            found.append(("Needle score", format_share(number(needle.get("score"))),
                          f"up to {longest:,} tokens"))
    return found


def _efficiency_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return what the steps made of their machine."""
    found = []
    tflops, mfu = run.curve("tflops_per_process"), run.curve("mfu")
    if tflops and len(tflops.finite().steps):
        share = ""
        if mfu and len(mfu.finite().steps):
            share = f", {format_share(np.median(mfu.finite().values))} of the peak"
        found.append(("Model TFLOP/s", f"{np.median(tflops.finite().values):.3g}",
                      f"each process, median over steps{share}"))
    memory = run.curve("peak_memory_bytes")
    if memory and math.isfinite(last_value(memory)):
        found.append(("Peak memory", f"{last_value(memory) / GIB:.2f} GiB", "process 0"))
    return found


def sections(run: Run, left_out: Collection[str] = ()) -> list[PageSection]:
    """Return a run's sections in reading order, without empty ones and the titles in `left_out`."""
    found = [declared.of(run) for declared in SECTIONS.values() if declared.title not in left_out]
    return [s for s in found if s.charts or s.tables or s.samples or s.json]


def _settings(run: Run) -> str:
    """Return the settings that differ from the recipe, a line for each; all settings of an unknown recipe."""
    if not run.config:
        return ""
    settings = {name: value for name, value in by_name(run.config) if not name.startswith("code")}
    try:
        of_recipe = dict(by_name(recipes.get(run.recipe()).to_dict()))
    except UserError:
        of_recipe = {}
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()
                     if name not in of_recipe or of_recipe[name] != value)


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
        blend = (", ".join(f"{name} {format_share(weight / total)}" for name, weight in phase.blend.items())
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
        return f"{format_share(1 - bits / baseline)} fewer" if baseline and math.isfinite(bits) else "–"

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
           format_duration(float(np.mean(save_s))), format_duration(max(save_s)),
           format_duration(float(np.mean(stall_s)))]
    return [PageTable(["checkpoints", "last at step", "mean time to save", "longest",
                       "mean stall of training"],
                      [row])]


def _data_tables(run: Run) -> list[PageTable]:
    consumed = run.data_consumed or {}
    tokens, plan = consumed.get("tokens") or {}, consumed.get("plan") or {}
    rows = []
    for name in dict.fromkeys([*plan, *tokens]):
        got, wanted = number(tokens.get(name, 0)), number(plan.get(name, 0))
        rows.append([name, f"{got:,.0f}", f"{wanted:,.0f}",
                     f"{100 * (got / wanted - 1):+.2f} %" if wanted else "not planned"])
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
    return cut_lines("" if text is None else str(text), MAX_SAMPLE_CHARACTERS)


def cut_lines(text: str, max_characters: int) -> str:
    """Shorten a text to whole lines, or its first line to whole words, and say how much is left out."""
    if len(text) <= max_characters:
        return text
    # a character more: the limit may fall on the end of a line or a word
    head = text[:max_characters + 1]
    end = head.rfind("\n")
    if end <= 0:
        end = head.rfind(" ")
    shown = head[:end if end > 0 else max_characters]
    return f"{shown.rstrip()}\n… ({len(text) - len(shown):,} more characters)"


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
                          "pairs right": ("pairs_right", format_share), "margin": ("margin", format_value),
                          "chosen likelier than rejected": ("chosen_likelier", format_share)})),
    ReportSection("Distance from the teacher", "On held-out documents, means over the tokens that are "
                  "learned, in nats: KL(teacher || student), and the divergence that the run learns.",
                  tables=partial(_before_and_after, "heldout_divergence", "tokens", {
                      "KL": ("kl", format_value), "learned divergence": ("divergence", format_value)})),
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
    ReportSection("Plan against what happened", accounts_text, tables=accounts_tables),
    ReportSection("Expert load", "MaxVio is the load of the busiest expert over the fair load, less 1 (arXiv "
                  "2408.15664); 0 is perfect balance. What belongs to a source was counted on its held-out "
                  "documents.", charts=_expert_charts, tables=_expert_tables),
    ReportSection("Speed", lines=SPEED, tables=_checkpoint_tables),
    ReportSection("Data consumed", tables=_data_tables),
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
    ReportSection("Where the time went", _time_text, tables=_time_tables),
    ReportSection("Starts, stops and restarts", tables=_attempt_tables),
    ReportSection("Settings", "Settings that differ from the recipe; RUN/config.json holds all of them.",
                  json=_settings),
    ReportSection("Provenance", "An artifact's manifest holds the hashes of all its files, so its own hash "
                  "stands for them.", tables=_provenance_tables),
)}
