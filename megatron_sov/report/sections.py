"""What the report says about one run: key figures and sections.  A section without data is left out."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_sov.config import from_dict
from megatron_sov.errors import UserError
from megatron_sov.obs.attempts import Attempt
from megatron_sov.obs.figures import duration, figure, large, number
from megatron_sov.obs.units import GIB
from megatron_sov.pages.content import Section, Table
from megatron_sov.plan import timetable_page
from megatron_sov.report.accounts import accounts_section
from megatron_sov.report.charts import (
    beside_charts,
    heldout_charts,
    loss_charts,
    meter_charts,
    needle_charts,
    plan_chart,
    scalar_charts,
)
from megatron_sov.report.divergence import divergence_section
from megatron_sov.report.forgetting import forgetting_section
from megatron_sov.report.gates import VERDICTS, gate_section
from megatron_sov.report.incidents import incident_section
from megatron_sov.report.media import media_section
from megatron_sov.report.pairs import pair_section
from megatron_sov.report.passk import passk_section
from megatron_sov.report.rounds import round_section
from megatron_sov.report.routing import expert_section
from megatron_sov.report.run_data import Phase, Provenance, Run
from megatron_sov.report.scores import score_section
from megatron_sov.report.spectrum import spectrum_section
from megatron_sov.report.steps import last_value
from megatron_sov.report.times import time_section
from megatron_sov.report.turns import turn_tables

MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 4000


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) of what a reader asks first; figures that the run lacks are left out."""
    found = []
    if run.start("num_params"):
        active = run.start("num_active_params")
        found.append(("Parameters", large(run.start("num_params")),
                      f"{large(active)} active for each token" if active else ""))
    tokens = last_value(run.curve("tokens"))
    if math.isfinite(tokens):
        loss = run.curve("loss")
        found.append(("Tokens trained", large(tokens), f"{int(loss.steps[-1]):,} steps" if loss else ""))
    if run.wall_s() > 0:
        ranks = run.start("num_ranks")
        found.append(("Wall time", duration(run.wall_s()),
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
        found.append(("Last training loss", f"{last_value(final):.4f}", "nats per token"))
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


def sections(run: Run) -> list[Section]:
    """Return a run's sections in reading order."""
    wanted = [
        Section("Training loss", charts=loss_charts(run), tables=_phase_tables(run)),
        Section("Meters", charts=meter_charts(run), side_by_side=True,
                text="What the objective measures beside its loss."),
        Section("Held-out loss", charts=heldout_charts(run), tables=_heldout_tables(run) + turn_tables(run),
                side_by_side=True),
        pair_section(run.heldout_pairs),
        divergence_section(run.heldout_divergence),
        score_section(run.scores, run.score_checks),
        forgetting_section(run.forgetting),
        round_section(run.rounds),
        Section("Evaluation beside training", charts=beside_charts(run), tables=_beside_tables(run),
                side_by_side=True),
        Section("Learning rate and gradient norm", side_by_side=True, charts=scalar_charts(run, [
            ("lr", "learning rate", "Learning rate."),
            ("grad_norm", "gradient norm", "Global gradient norm, before clipping.")])),
        _plan_section(run),
        accounts_section(run),
        expert_section(run),
        Section("Speed", side_by_side=True, charts=scalar_charts(run, [
            ("tokens_per_s", "tokens per second", "Tokens per second, all processes together."),
            ("step_time_s", "seconds", "Time of one optimizer step."),
            ("tflops_per_process", "TFLOP/s", "Model TFLOP/s of each process; recomputing counts once."),
            ("mfu", "share", "Model FLOPs utilisation: the share of the GPU's peak."),
            ("peak_memory_bytes", "bytes", "Most memory that process 0 has had, on its GPU or the host."),
            ("reserved_memory_bytes", "bytes", "Most memory that process 0's allocator has held."),
            ("gpu_power_w", "W", "Power of process 0's GPU."),
            ("gpu_utilization", "share", "Share of time in which process 0's GPU computed something."),
            ("gpu_temperature_c", "°C", "Temperature of process 0's GPU.")]),
            tables=_checkpoint_tables(run)),
        _data_section(run),
        incident_section(run),
        Section("Needle in a haystack", side_by_side=True,
                charts=[c for n in run.needles if n.get("cells") for c in needle_charts(n)],
                text="Share of questions about hidden facts that the model answers, by the length of the "
                     "context and their depth in it."),
        passk_section(run.passk),
        media_section(run.media, run.media_retrieval),
        spectrum_section(run.ssp_probes),
        gate_section(run.gate_checks, run.searches),
        _sample_section(run),
        Section("Proof of the conversion",
                tables=[_conversion_table(c) for c in run.conversions if c.get("checks")],
                text="The exported model against the trained one."),
        time_section(run.wall_time),
        Section("Starts, stops and restarts", tables=_attempt_tables(run.attempts)),
        Section("Settings", json=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
                text="The resolved settings that the run was started with."),
        Section("Provenance", tables=_provenance_tables(run.provenance),
                text="An artifact's manifest holds the hashes of all its files, "
                     "so its own hash stands for them."),
    ]
    return [s for s in wanted if s.charts or s.tables or s.samples or s.json]


def _plan_section(run: Run) -> Section:
    """Return what the settings plan for each step; nothing for settings of another version."""
    title = "Plan: learning rate, batch size, blends"
    try:
        config = from_dict(run.config) if run.config else None
    except UserError:
        config = None
    if config is None or config.problems(run.start("num_ranks") or 1):
        return Section(title)
    return Section(title, charts=timetable_page.charts(config), tables=[timetable_page.table(config)],
                   side_by_side=True)


def _beside_tables(run: Run) -> list[Table]:
    rows = [[f"{b.step:,}", b.task, b.failure] for b in run.evaluations if b.failure]
    return [Table(["step", "task", "why there is no figure"], rows)] if rows else []


def _provenance_tables(provenance: list[Provenance]) -> list[Table]:
    rows = [[p.role, p.kind, p.path, Markup("<code>{}</code>").format(p.manifest_sha256)] for p in provenance]
    return [Table(["", "kind", "artifact", "SHA-256 of the manifest"], rows)] if rows else []


def _phase_tables(run: Run) -> list[Table]:
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
        consumed = large(within[-1] - (before[-1] if len(before) else 0)) if len(within) else "–"
        tail = inside[-max(1, len(inside) // 20):]
        total = sum(phase.blend.values())
        blend = (", ".join(f"{name} {weight / total:.0%}" for name, weight in phase.blend.items())
                 if total > 0 else "by size")
        rows.append([phase.name, f"{phase.first_step:,} to {phase.last_step:,}", f"{phase.seq_len_tokens:,}",
                     _batch_sizes(phase), blend, consumed, figure(float(inside[0])),
                     figure(float(np.mean(tail)))])
    head = ["phase", "steps", "sample (tokens)", "batch (samples)", "blend", "tokens", "first loss",
            "loss, mean of the last 5 %"]
    return [Table(head, rows)] if rows else []


def _batch_sizes(phase: Phase) -> str:
    """Return the samples of a step: one number, or first to last of a ramp."""
    sizes = [f"{n:,}" for n in phase.batch_sizes if n]
    return "–" if not sizes else sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _heldout_tables(run: Run) -> list[Table]:
    rows = []
    for name, h in run.heldout.items():
        bits, baseline = last_value(h.bits_per_byte), h.baseline_bits_per_byte
        gain = f"{1 - bits / baseline:.1%} fewer" if baseline and math.isfinite(bits) else "–"
        rows.append([name, f"{h.num_tokens:,}", figure(float(h.loss.values[0])), figure(last_value(h.loss)),
                     figure(bits), figure(baseline if baseline is not None else math.nan), gain])
    head = ["source", "tokens", "first loss", "last loss", "bits per byte", "bigram's bits per byte",
            "bits against the bigram"]
    return [Table(head, rows)] if rows else []


def _checkpoint_tables(run: Run) -> list[Table]:
    save_s = [number(c["save_s"]) for c in run.checkpoints if c.get("save_s") is not None]
    if not save_s:
        return []
    stall_s = [number(c.get("stall_s", c["save_s"])) for c in run.checkpoints if c.get("save_s") is not None]
    row = [f"{len(save_s):,}", f"{int(run.checkpoints[-1]['step']):,}", duration(float(np.mean(save_s))),
           duration(max(save_s)), duration(float(np.mean(stall_s)))]
    return [Table(["checkpoints", "last at step", "mean time to save", "longest", "mean stall of training"],
                  [row])]


def _data_section(run: Run) -> Section:
    padding = scalar_charts(run, [("padding_share", "share", "Part of each batch that is padding.")])
    consumed = run.data_consumed or {}
    drawn = plan_chart(consumed)
    if drawn is None:
        return Section("Data consumed", charts=padding)
    tokens, plan = consumed.get("tokens") or {}, consumed.get("plan") or {}
    rows = []
    for name in dict.fromkeys([*plan, *tokens]):
        got, wanted = number(tokens.get(name, 0)), number(plan.get(name, 0))
        rows.append([name, f"{got:,.0f}", f"{wanted:,.0f}",
                     f"{got / wanted - 1:+.2%}" if wanted else "not planned"])
    tables = [Table(["source", "tokens consumed", "tokens planned", "difference"], rows)]
    if over_long := consumed.get("over_long"):
        fate = {"cut": "cut", "drop": "left out"}.get(str(consumed.get("over_long_are")), "too long")
        tables.append(Table(["source", f"conversations or pairs longer than a sample, {fate}"],
                            [[name, f"{number(count):,.0f}"] for name, count in over_long.items()]))
    return Section("Data consumed", charts=[drawn, *padding], tables=tables)


def _sample_section(run: Run) -> Section:
    shown = [{k: _cut(s.get(k)) for k in ("prompt", "text", "target")} for s in run.samples[:MAX_SAMPLES]]
    text = ""
    if shown:
        left_out = len(run.samples) - len(shown)
        more = f" {left_out:,} more are in the run's events." if left_out else ""
        text = f"What the model wrote at step {int(run.samples[0].get('step') or 0):,}, unedited.{more}"
    return Section("Samples", text=text, samples=shown)


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    left_out = len(text) - MAX_SAMPLE_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_SAMPLE_CHARACTERS]} … ({left_out:,} more characters)"


def _conversion_table(conversion: dict[str, Any]) -> Table:
    rows = [[str(c.get("name", "")), measured(c.get("value")), measured(c.get("limit")),
             VERDICTS[bool(c.get("passed"))]]
            for c in conversion["checks"]]
    return Table([f"check of {conversion.get('target') or 'the export'}", "measured", "limit", "result"],
                 rows)


def measured(value: Any) -> str:
    """Return what a check measured, or its limit; a dash where it has none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt_tables(attempts: list[Attempt]) -> list[Table]:
    rows = []
    for i, attempt in enumerate(attempts, 1):
        start = attempt.start
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(number(start.get("time_s"))))
        resumed = start.get("resumed_from")
        origin = f"from step {resumed}" if resumed else "from the beginning"
        if attempt.resume_reason:
            origin += f" ({attempt.resume_reason})"
        layout = ", ".join(f"{k} {v}" for k, v in (start.get("layout") or {}).items())
        processes = f"{start.get('num_ranks', '–')}" + (f" ({layout})" if layout else "")
        rows.append([str(i), began, origin, processes, machine(start.get("machine")),
                     "–" if attempt.last_step is None else f"{attempt.last_step:,}",
                     duration(attempt.wall_s()), attempt.outcome])
    head = ["", "started", "resumed", "processes (layout)", "machine", "last step", "time", "outcome"]
    return [Table(head, rows)] if rows else []


def machine(value: Any) -> str:
    """Return the machine of a `run_start` in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value or "–")
