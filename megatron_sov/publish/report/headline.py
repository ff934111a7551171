"""The few figures by which a run is judged: a loss, or what its objective is really after; and what each
stage of a model gained by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import PageTable
from megatron_sov.publish.report.charts import PER_TOKEN, loss_unit
from megatron_sov.publish.report.run_data import Heldout, Run
from megatron_sov.publish.report.steps import Curve, last_value
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.meters import LOSS, Meter, read_headline

HIGHER, LOWER = "higher", "lower"


def headlines(run: Run) -> list[tuple[Meter, Curve]]:
    """Return a run's headline meters that it has measured, with their curves: those that its start names; the
    loss where there are none."""
    declared = run.start("headline")
    meters = read_headline({"headline": declared})[0] if declared else ()
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


# What each stage gained: a row for each figure that was measured before and after it.


def gains(runs: Sequence[Run]) -> list[PageTable]:
    """Return the table of each stage's first and last figures; nothing if nothing was measured."""
    rows = [[run.name, *row] for run in runs for row in (
        *_text_gains(run), *_meter_gains(run), *_needle_gains(run), *_rewards(run))]
    return [PageTable(["stage", "figure", "before", "after", "rule"], rows)] if rows else []


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


def _row(figure: str, values: Sequence[float], text: Callable[[float], str], rule: str) -> list[str]:
    """Return a figure's first and last value; a figure that was measured once has no first one."""
    return [figure, text(values[0]) if len(values) > 1 else "–", text(values[-1]), rule]


def _text_gains(run: Run) -> Iterator[list[str]]:
    """Return bits per byte of held-out text, and the loss of each source of conversations."""
    if loss_unit(run) != PER_TOKEN:
        return
    before, after = heldout_text([run])
    if math.isfinite(after):
        yield _row("held-out text, bits per byte", [before, after], "{:.3f}".format, "lower is better")
    for name, source in run.heldout.items():
        values = source.loss.finite().values.tolist()
        if source.is_chat and values:
            yield _row(f"held-out responses of {name}, nats per token", values, "{:.3f}".format,
                       "lower is better")


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


def _meter_gains(run: Run) -> Iterator[list[str]]:
    """Return what an objective is after; on held-out data if it measures something there."""
    for meter, curve in headlines(run):
        rule = f"{meter.better} is better" if meter.better else "–"
        kind, _, field = meter.heldout.partition(".")
        of_source: dict[str, list[float]] = {}
        for event in run.of(kind) if kind else ():
            of_source.setdefault(str(event.get("source")), []).append(parse_number(event.get(field)))
        for name, values in of_source.items():
            of = f" of {name}" if len(of_source) > 1 else ""
            yield _row(f"held-out {meter.title}{of}", values, meter.text, rule)
        if not of_source and loss_unit(run) != PER_TOKEN:
            yield _row(meter.title, curve.finite().values.tolist(), meter.text, rule)


def _needle_gains(run: Run) -> Iterator[list[str]]:
    scores = [parse_number(needle.get("score")) for needle in run.needles if needle.get("cells")]
    if scores:
        yield _row("needles found", scores, format_share, "higher is better")


def _rewards(run: Run) -> Iterator[list[str]]:
    """Return the newest mean of each reward that judged the run's responses."""
    for reward, event in {str(event.get("reward")): event for event in run.of("score")}.items():
        mean = parse_number(event.get("mean_reward"))
        if math.isfinite(mean):
            yield _row(f"mean reward of {parse_number(event.get('scored')):,.0f} responses", [mean],
                       "{:.3g}".format, f"reward {reward}")
