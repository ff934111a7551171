"""The few figures by which a run is judged while it learns: a loss, or what its objective is really after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sov.base.pages.page import Chart
from megatron_sov.publish.report.charts import PER_TOKEN, DrawnLine, draw_lines, loss_unit, named
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import Curve
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


def headline_charts(runs: Sequence[Run], *, small: bool = False, but_loss: bool = False
                    ) -> list[Chart]:
    """Return a chart for each headline meter of the runs, a line for each run that has it; `but_loss` leaves
    losses out, which have a chart elsewhere."""
    lines: dict[str, tuple[Meter, list[DrawnLine]]] = {}
    for i, (run, name) in enumerate(named(runs)):
        for meter, curve in headlines(run):
            if not (but_loss and meter.name == "loss"):
                line = DrawnLine(name, curve, hue=i if len(runs) > 1 else None)
                lines.setdefault(meter.title, (meter, []))[1].append(line)
    charts = [draw_lines(of_runs, meter.unit or meter.title, caption_of(meter), smooth=meter.name == "loss",
                         small=small, run=runs[0] if len(runs) == 1 else None)
              for meter, of_runs in lines.values()]
    return [c for c in charts if c]


def caption_of(meter: Meter) -> str:
    """Return what a meter's chart shows, in a sentence."""
    text = meter.title[:1].upper() + meter.title[1:]
    return (f"{text}, {meter.unit}" if meter.unit else text) + (f"; {meter.better} is better."
                                                               if meter.better else ".")


def change(meter: Meter, curve: Curve) -> str:
    """Return a meter's first and last value."""
    values = curve.finite().values
    first, last = (meter.text(number(value)) for value in (values[0], values[-1]))
    return last if len(values) == 1 else f"{first} → {last}"


def facts_of(run: Run) -> list[tuple[str, Any]]:
    """Return label and change of each headline meter but a per-token loss, which has places enough."""
    return [(meter.title, change(meter, curve)) for meter, curve in headlines(run) if meter != LOSS]
