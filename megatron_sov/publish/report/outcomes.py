"""Outcomes of a model's stages for the report's first screen: gains in figures, and verdicts of gates."""

import math
import re
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from megatron_sov.base.figures import format_share, format_value
from megatron_sov.base.pages.page import PageTable
from megatron_sov.publish.report.charts import PER_TOKEN, get_loss_unit
from megatron_sov.publish.report.run_data import HeldoutSource, Run
from megatron_sov.publish.report.steps import Curve, get_last_value
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import COMPLETE
from megatron_sov.runs.obs.meters import LOSS, Meter, read_headline

VERDICTS = {True: Markup('<span class="good">passed</span>'),
            False: Markup('<span class="bad">FAILED</span>')}
NO_GATE = "no gate set"
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’`)\]]*$")
MIN_SENTENCE_WORDS = 3


def build_gain_tables(runs: Sequence[Run]) -> list[PageTable]:
    """Return a `PageTable` with first and last values per stage; [] without measurements."""
    rows = [[run.name, *row] for run in runs for row in (
        *_iter_text_gains(run), *_iter_meter_gains(run), *_iter_needle_gains(run), *_iter_reward_means(run))]
    return [PageTable(["stage", "figure", "before", "after", "rule"], rows)] if rows else []


def find_headline_curves(run: Run) -> list[tuple[Meter, Curve]]:
    """Return a run's headline meters from `run_start` with their curves; without any, the loss."""
    declared = run.get_start_field("headline")
    meters = read_headline({"headline": declared})[0] if declared else ()
    headline = []
    for meter in meters:
        curve = _find_column(run, meter.name)
        if meter != LOSS and curve is not None and len(curve.drop_nonfinite().steps):
            headline.append((meter, curve))
    loss, unit = run.get_curve("loss"), get_loss_unit(run)
    if not headline and loss is not None and len(loss.drop_nonfinite().steps):
        headline.append((LOSS if unit == PER_TOKEN else Meter("loss", unit), loss))
    return headline


def _find_column(run: Run, name: str) -> Curve | None:
    for group in ("meters", "losses", "", "rounds"):
        if name in (curves := run.curves.get(group, {})):
            return curves[name]
    return None


def compute_text_bits_per_byte(runs: Sequence[Run]) -> tuple[float, float]:
    """Return held-out `bits_per_byte` before and after all stages; NaN if unknown.

    Sources are the text sources (no conversations) in the first stage that has any; the last stage with the
    same sources gives the second value.
    """
    texts = [[name for name, source in run.heldout.items() if not source.is_chat] for run in runs]
    first = next((i for i, names in enumerate(texts) if names), None)
    if first is None:
        return math.nan, math.nan
    last = max(i for i, names in enumerate(texts) if set(names) >= set(texts[first]))
    return (_weight_by_bytes(runs[first], texts[first], lambda source: float(source.bits_per_byte.values[0])),
            _weight_by_bytes(runs[last], texts[first], lambda source: get_last_value(source.bits_per_byte)))


def _weight_by_bytes(run: Run, names: Sequence[str], get_value: Callable[[HeldoutSource], float]) -> float:
    """Return the mean over held-out sources, weighted by bytes; NaN if a source's bytes are unknown."""
    total = num_bytes = 0.0
    for source in (run.heldout[name] for name in names):
        per_byte = get_last_value(source.bits_per_byte)
        if not per_byte > 0:
            return math.nan
        source_bytes = get_last_value(source.loss) * source.num_tokens / math.log(2) / per_byte
        total, num_bytes = total + get_value(source) * source_bytes, num_bytes + source_bytes
    return total / num_bytes if num_bytes else math.nan


def _build_gain_row(figure: str, values: Sequence[float], text: Callable[[float], str], rule: str
                    ) -> list[str]:
    """Return first and last value; with a single measurement only the last."""
    return [figure, text(values[0]) if len(values) > 1 else "–", text(values[-1]), rule]


def _iter_text_gains(run: Run) -> Iterator[list[str]]:
    """Yield `bits_per_byte` on held-out text, and `loss` per held-out source with conversations."""
    if get_loss_unit(run) != PER_TOKEN:
        return
    before, after = compute_text_bits_per_byte([run])
    if math.isfinite(after):
        yield _build_gain_row("held-out text, bits per byte", [before, after], "{:.3f}".format,
                              "lower is better")
    for name, source in run.heldout.items():
        values = source.loss.drop_nonfinite().values.tolist()
        if source.is_chat and values:
            yield _build_gain_row(f"held-out responses of {name}, nats per token", values, "{:.3f}".format,
                                  "lower is better")


def _iter_meter_gains(run: Run) -> Iterator[list[str]]:
    """Yield the headline meters, on held-out data if `Meter.heldout` names an event."""
    for meter, curve in find_headline_curves(run):
        rule = f"{meter.better} is better" if meter.better else "–"
        kind, _, field = meter.heldout.partition(".")
        values_by_source: dict[str, list[float]] = {}
        for event in run.get_events(kind):
            values_by_source.setdefault(str(event.get("source")), []).append(parse_number(event.get(field)))
        for source, values in values_by_source.items():
            suffix = f" of {source}" if len(values_by_source) > 1 else ""
            yield _build_gain_row(f"held-out {meter.title}{suffix}", values, meter.text, rule)
        if not values_by_source and get_loss_unit(run) != PER_TOKEN:
            yield _build_gain_row(meter.title, curve.drop_nonfinite().values.tolist(), meter.text, rule)


def _iter_needle_gains(run: Run) -> Iterator[list[str]]:
    scores = [parse_number(needle.get("score")) for needle in run.needles if needle.get("cells")]
    if scores:
        yield _build_gain_row("needles found", scores, format_share, "higher is better")


def _iter_reward_means(run: Run) -> Iterator[list[str]]:
    """Yield `mean_reward` from the newest `score` event per reward (`score --run`)."""
    for reward, event in {str(event.get("reward")): event for event in run.get_events("score")}.items():
        mean = parse_number(event.get("mean_reward"))
        if math.isfinite(mean):
            yield _build_gain_row(f"mean reward of {parse_number(event.get('scored')):,.0f} responses",
                                  [mean], "{:.3g}".format, f"reward {reward}")


def build_verdict_tables(runs: list[Run]) -> list[PageTable]:
    """Return a `PageTable` with the verdicts on a model's stages; [] without checks."""
    rows = [*_iter_stage_verdicts(runs)]
    for run in runs:
        rows += [*_iter_gate_verdicts(run), *_iter_needle_verdicts(run)]
    rows += [row for run in runs for row in _iter_export_verdicts(run)]
    return [PageTable(["check", "verdict", "measured"], rows)] if rows else []


def build_verdict_sentence(runs: list[Run]) -> str:
    """Return the report's first sentence: checks, whole sentences, held-out text, missing gates."""
    rows = [row for table in build_verdict_tables(runs) for row in table.rows]
    failed = [row[0] for row in rows if 'class="bad"' in row[1]]
    num_judged = len([row for row in rows if row[1] != NO_GATE])
    parts = []
    if num_judged:
        failures = f" (failed: {', '.join(failed)})" if failed else ""
        parts.append(f"{num_judged - len(failed)} of {num_judged} checks passed{failures}")
    samples = next((run.samples for run in reversed(runs) if run.samples), [])
    if samples:
        texts = [str(sample.get("text") or "").strip() for sample in samples]
        sentences = [text for text in texts
                     if len(text.split()) >= MIN_SENTENCE_WORDS and SENTENCE_END.search(text)]
        parts.append(f"{len(sentences):,} of {len(texts):,} answers are whole sentences")
    before, after = compute_text_bits_per_byte(runs)
    if math.isfinite(before + after):
        parts.append(f"held-out text {format_value(before, 3)} → {format_value(after, 3)} bits per byte")
    parts += [f"{NO_GATE} for {row[0].lower()}" for row in rows if row[1] == NO_GATE]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _iter_stage_verdicts(runs: list[Run]) -> Iterator[list[str]]:
    started = [run for run in runs if run.attempts]
    incomplete = [f"{run.name} {run.attempts[-1].outcome}" for run in started
                  if run.attempts[-1].outcome != COMPLETE]
    if started:
        verdict = Markup('<span class="{}">{} of {}</span>').format(
            "bad" if incomplete else "good", len(started) - len(incomplete), len(started))
        complete = f"{', '.join(run.name for run in started)}: complete"
        yield ["Stages", verdict, "; ".join(incomplete) or complete]


def _iter_gate_verdicts(run: Run) -> Iterator[list[str]]:
    """Yield the last `gate` event."""
    for check in run.gate_checks[-1:]:
        loss, limit = parse_number(check.get("loss")), parse_number(check.get("loss_limit"))
        text = f"short-context loss {loss:.3f}, limit {limit:.3f}; step {int(check.get('step') or 0):,}"
        if accuracies := [parse_number(row.get("accuracy")) for row in check.get("rows") or []]:
            threshold = format_share(parse_number(check.get("threshold")))
            text = f"needles {format_share(min(accuracies))}, {threshold} needed; {text}"
        verdict = VERDICTS[bool(check.get("passed"))]
        if check.get("judged") and not check.get("passed"):
            verdict = Markup("good, before step {}").format(check.get("min_steps"))
        yield ["Gate", verdict, f"{run.name}: {text}"]


def _iter_needle_verdicts(run: Run) -> Iterator[list[str]]:
    """Yield the newest `needle` event in a run without `gate` events: a figure without a verdict."""
    needles = [needle for needle in run.needles if needle.get("cells")]
    if needles and not run.gate_checks:
        longest = max(int(cell["length_tokens"]) for cell in needles[-1]["cells"])
        score = format_share(parse_number(needles[-1].get("score")))
        yield ["Needles", NO_GATE, f"{run.name}: {score} found, up to {longest:,} tokens"]


def _iter_export_verdicts(run: Run) -> Iterator[list[str]]:
    for event in [event for event in run.get_events("conversion") if event.get("checks")][-1:]:
        passed = [bool(check.get("passed")) for check in event["checks"]]
        yield ["Export", VERDICTS[all(passed)], f"{run.name}: {sum(passed)} of {len(passed)} checks"]
