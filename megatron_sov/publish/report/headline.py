"""The few figures by which a run is judged: a loss, or what its objective is really after; and what each
stage of a model gained by them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_sov.base.figures import format_share, format_value
from megatron_sov.base.pages.page import PageTable
from megatron_sov.publish.report.charts import PER_TOKEN, loss_unit
from megatron_sov.publish.report.run_data import Heldout, Run
from megatron_sov.publish.report.steps import Curve, last_value
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.meters import LOSS, Meter, headline_of_start

HIGHER, LOWER = "higher", "lower"


def headlines(run: Run) -> list[tuple[Meter, Curve]]:
    """Return a run's headline meters that it has measured, with their curves: those that its start names; the
    loss where there are none."""
    declared = run.start("headline")
    meters = headline_of_start({"headline": declared})[0] if declared else ()
    found = [(meter, curve) for meter in meters if meter != LOSS
             and (curve := column(run, meter.name)) is not None and len(curve.finite().steps)]
    if found:
        return found
    loss = run.curve("loss")
    unit = loss_unit(run)
    meter = LOSS if unit == PER_TOKEN else Meter("loss", unit)
    return [(meter, loss)] if loss is not None and len(loss.finite().steps) else []


def column(run: Run, name: str) -> Curve | None:
    """Return a column of the steps' meters, losses or own fields, or of the means of rounds."""
    return next((curves[name] for group in ("meters", "losses", "", "rounds")
                 if name in (curves := run.curves.get(group, {}))), None)


def change(meter: Meter, curve: Curve) -> str:
    """Return a meter's first and last value."""
    values = curve.finite().values
    first, last = (meter.text(number(value)) for value in (values[0], values[-1]))
    return last if len(values) == 1 else f"{first} → {last}"


def facts_of(run: Run) -> list[tuple[str, Any]]:
    """Return label and change of each headline meter but a per-token loss, which has places enough."""
    return [(meter.title, change(meter, curve)) for meter, curve in headlines(run) if meter != LOSS]


# What each stage gained: a row for each figure that was measured before and after it.

Figures = dict[Any, float]
"""What was measured of the model so far -> its newest value."""
Row = tuple[str, float, float, Callable[[float], str], str]
"""Figure, before, after, as text, the rule by which it counts."""
RULE = "{} is better"


def gains(runs: Sequence[Run]) -> list[PageTable]:
    """Return the table of the changes that each stage made; nothing if nothing was measured.

    Before is what an earlier stage of the same model left, else the stage's own first measurement.

    Args:
        runs: the stages of one model, in order.
    """
    known: Figures = {}
    rows = []
    has_figures = False
    for run in runs:
        measured = [*_text_gains(run, known), *_meter_gains(run), *_gate_gains(run),
                    *_score_gains(run, known)]
        has_figures |= bool(measured)
        rows += [[run.name, what, "–" if math.isnan(before) else text(before), text(after), rule]
                 for what, before, after, text, rule in measured]
        for proof in run.of("conversion")[-1:]:
            checks = [bool(check.get("passed")) for check in proof.get("checks") or []]
            if checks:
                rows.append([run.name, "checks of the export", "–", f"{sum(checks)} of {len(checks)}",
                             "all pass"])
    return [PageTable(["stage", "figure", "before", "after", "rule"], rows)] if has_figures else []


def heldout_text(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the bits per byte of held-out text before and after all stages; NaN if unknown.

    The sources are those of the first stage that measures text; the last stage that measures all of them
    gives the second figure.
    """
    texts = [[name for name, source in run.heldout.items() if not source.is_chat] for run in runs]
    first = next((i for i, names in enumerate(texts) if names), None)
    if first is None:
        return math.nan, math.nan
    last = max(i for i, names in enumerate(texts) if set(names) >= set(texts[first]))
    return (_by_bytes(runs[first], texts[first], lambda source: float(source.bits_per_byte.values[0])),
            _by_bytes(runs[last], texts[first], lambda source: last_value(source.bits_per_byte)))


def _text_gains(run: Run, known: Figures) -> Iterator[Row]:
    """Return bits per byte of held-out text, and the loss of each source of conversations."""
    chats = [name for name, source in run.heldout.items() if source.is_chat]
    texts = [name for name in run.heldout if name not in chats]
    of_texts = [_by_bytes(run, texts, lambda source: float(source.bits_per_byte.values[0])),
                _by_bytes(run, texts, lambda source: last_value(source.bits_per_byte))]
    # an objective without a loss of tokens measures them as a check, and is not after them
    if loss_unit(run) == PER_TOKEN:
        if texts:
            bigram = _by_bytes(run, texts, lambda source: source.baseline_bits_per_byte)
            yield ("held-out text, bits per byte", known.get(tuple(sorted(texts)), _first(of_texts)),
                   of_texts[1], "{:.3f}".format, RULE.format(LOWER)
                   + ("" if math.isnan(bigram) else f"; a bigram model has {bigram:.3f}"))
        for name in chats:
            values = run.heldout[name].loss.finite().values.tolist()
            before = known.get(name, _first(values) if len(values) else math.nan)
            if len(values) and not math.isnan(before):  # one number alone is what a later stage begins from
                yield (f"held-out responses of {name}, nats per token", before, values[-1],
                       "{:.3f}".format, RULE.format(LOWER))
    known |= {name: last_value(run.heldout[name].loss) for name in chats}
    if texts:
        known[tuple(sorted(texts))] = of_texts[1]


def _first(values: Sequence[float]) -> float:
    return values[0] if len(values) > 1 and values[0] != values[-1] else math.nan


def _by_bytes(run: Run, names: Sequence[str], of: Callable[[Heldout], float | None]) -> float:
    """Return the mean of a figure of some held-out sources, each weighted by its bytes; NaN: one has none."""
    total = num_bytes = 0.0
    for source in (run.heldout[name] for name in names):
        per_byte, value = last_value(source.bits_per_byte), of(source)
        if not per_byte > 0 or value is None:
            return math.nan
        of_source = last_value(source.loss) * source.num_tokens / math.log(2) / per_byte
        total, num_bytes = total + value * of_source, num_bytes + of_source
    return total / num_bytes if num_bytes else math.nan


def _meter_gains(run: Run) -> Iterator[Row]:
    """Return what an objective is after; on held-out data alone where it measures something there."""
    found = headlines(run)
    held = [(meter, curve) for meter, curve in found if run.of(meter.heldout.partition(".")[0])]
    for meter, curve in held or found:
        kind, _, field = meter.heldout.partition(".")
        of_source: dict[str, list[float]] = {}
        for event in run.of(kind) if kind else ():
            of_source.setdefault(str(event.get("source")), []).append(number(event.get(field)))
        rule = RULE.format(meter.better) if meter.better else "–"
        for name, values in of_source.items():
            of = f" of {name}" if len(of_source) > 1 else ""
            yield f"held-out {meter.title}{of}", values[0], values[-1], meter.text, rule
        if not of_source and loss_unit(run) != PER_TOKEN:
            values = curve.finite().values.tolist()
            yield meter.title, _first(values), values[-1], meter.text, rule


def _gate_gains(run: Run) -> Iterator[Row]:
    """Return the share of needles that is found, in the worst row of a gate, or in all of a test."""
    gates = [(min(found), number(check.get("threshold"))) for check in run.gate_checks
             if (found := [number(row.get("accuracy")) for row in check.get("rows") or []])]
    if gates:
        yield ("needles found, worst length", gates[0][0] if len(gates) > 1 else math.nan, gates[-1][0],
               format_share, f"the gate needs {format_share(gates[-1][1])}")
        return
    scores = [number(needle.get("score")) for needle in run.needles if needle.get("cells")]
    if scores:
        yield "needles found", _first(scores), scores[-1], format_share, RULE.format(HIGHER)


def _score_gains(run: Run, known: Figures) -> Iterator[Row]:
    """Return the mean of each reward that judged the run's responses, with an earlier stage's of the same
    reward and questions before it."""
    newest: dict[tuple[str, ...], Mapping[str, Any]] = {
        (str(event.get("reward")), *(json.dumps(event.get(name), sort_keys=True)
                                     for name in ("settings", "reward_version", "questions"))): event
        for event in run.of("score")}
    for key, event in newest.items():
        settings, after = event.get("settings"), number(event.get("mean_reward"))
        if not math.isfinite(after):
            continue
        rule = ", ".join(f"{name} {value}" for name, value in settings.items()) \
            if isinstance(settings, dict) else ""
        yield (f"mean reward of {number(event.get('scored')):,.0f} responses", known.get(key, math.nan),
               after, format_share if 0 <= after <= 1 else partial(format_value, digits=3),
               f"reward {key[0]}{': ' if rule else ''}{rule}")
        known[key] = after
