"""The few figures by which a run is judged while it learns: a loss, or what its objective is really after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.pages.page import Chart
from megatron_sov.publish.report.charts import PER_TOKEN, DrawnLine, draw_lines, loss_unit, named
from megatron_sov.publish.report.run_data import LEARNING_GROUPS, Run
from megatron_sov.publish.report.steps import Curve
from megatron_sov.runs.obs.figures import figure, number

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class HeadlineMeter:
    """A column of a run's events that says how well it learns."""

    name: str
    """The column: of the steps, of their meters, or of the means of rounds."""
    unit: str = ""
    """"share" is shown in percent."""
    better: str = ""
    """higher, lower, or empty where neither is."""
    title: str = ""
    """What people call it; empty: the name in words."""

    @property
    def label(self) -> str:
        return self.title or self.name.replace("_", " ")

    def shown(self, value: float) -> str:
        """Return a value in the meter's unit."""
        if self.unit == "share":
            return f"{value:.1%}"
        return figure(value) + (f" {self.unit}" if self.unit else "")


LOSS = HeadlineMeter("loss", PER_TOKEN, LOWER, "training loss")
HEADLINES = {
    "policy": (HeadlineMeter("reward", better=HIGHER, title="mean reward"),
               HeadlineMeter("response_tokens", "tokens", title="length of a response"),
               HeadlineMeter(LEARNING_GROUPS, "share", HIGHER, "groups that learn")),
    "preference": (HeadlineMeter("pairs_right", "share", HIGHER, "pairs ranked right"),
                   HeadlineMeter("margin", better=HIGHER, title="margin")),
    "distill": (HeadlineMeter("kl", "nats", LOWER, "distance from the teacher (KL)"),)}
"""Built-in objective -> its headline meters, for runs whose start does not declare them."""


def headlines(run: Run) -> list[tuple[HeadlineMeter, Curve]]:
    """Return a run's headline meters that it has measured, with their curves: those that its start declares,
    or those of its objective; the loss where there are none."""
    declared = run.start("headline")
    meters = [HeadlineMeter(str(one.get("name")), str(one.get("unit") or ""), str(one.get("better") or ""),
                            str(one.get("label") or "")) for one in declared if isinstance(one, dict)
              ] if isinstance(declared, list) else HEADLINES.get(str(run.setting("objective", "name")), ())
    found = [(meter, curve) for meter in meters
             if (curve := column(run, meter.name)) is not None and len(curve.finite().steps)]
    if found:
        return found
    loss = run.curve("loss")
    unit = loss_unit(run)
    meter = LOSS if unit == PER_TOKEN else HeadlineMeter("loss", title=unit)
    return [(meter, loss)] if loss is not None and len(loss.finite().steps) else []


def column(run: Run, name: str) -> Curve | None:
    """Return a column of the steps' meters, losses or own fields, or of the means of rounds."""
    return next((curves[name] for group in ("meters", "losses", "", "rounds")
                 if name in (curves := run.curves.get(group, {}))), None)


def headline_charts(runs: Sequence[Run], *, small: bool = False, but_loss: bool = False
                    ) -> list[Chart]:
    """Return a chart for each headline meter of the runs, a line for each run that has it; `but_loss` leaves
    losses out, which have a chart elsewhere."""
    lines: dict[str, tuple[HeadlineMeter, list[DrawnLine]]] = {}
    for i, (run, name) in enumerate(named(runs)):
        for meter, curve in headlines(run):
            if not (but_loss and meter.name == "loss"):
                line = DrawnLine(name, curve, hue=i if len(runs) > 1 else None)
                lines.setdefault(meter.label, (meter, []))[1].append(line)
    charts = [draw_lines(of_runs, meter.unit or meter.label, caption_of(meter), smooth=meter.name == "loss",
                         small=small, run=runs[0] if len(runs) == 1 else None)
              for meter, of_runs in lines.values()]
    return [c for c in charts if c]


def caption_of(meter: HeadlineMeter) -> str:
    """Return what a meter's chart shows, in a sentence."""
    text = meter.label[:1].upper() + meter.label[1:]
    return (f"{text}, {meter.unit}" if meter.unit else text) + (f"; {meter.better} is better."
                                                               if meter.better else ".")


def change(meter: HeadlineMeter, curve: Curve) -> str:
    """Return a meter's first and last value."""
    values = curve.finite().values
    first, last = (meter.shown(number(value)) for value in (values[0], values[-1]))
    return last if len(values) == 1 else f"{first} → {last}"


def facts_of(run: Run) -> list[tuple[str, Any]]:
    """Return label and change of each headline meter but a per-token loss, which has places enough."""
    return [(meter.label, change(meter, curve)) for meter, curve in headlines(run) if meter is not LOSS]
