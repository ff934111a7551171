"""Headline meters: which columns of a run's steps tell whether it learns what it is for.

An objective names them, the event `run_start` carries them, and the progress bar, `status`, the last line and
reports are views of them.  Light on purpose: it imports nothing heavy and reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_sov.runs.obs.figures import number

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Meter:
    """A column of `step` events."""

    name: str
    """The column: a key of `meters`, of `losses`, or of the event."""
    label: str = ""
    """What people call it; empty: its name with spaces."""
    unit: str = ""
    """"share" is shown in percent; others stand behind the number."""
    better: Better = ""
    """Which direction is progress; empty: neither."""
    heldout: str = ""
    """Event and field that measure the same on held-out data before the first and after the last step,
    "heldout_pairs.right"; empty: none."""

    @property
    def title(self) -> str:
        return self.label or self.name.replace("_", " ")

    def value(self, event: Mapping[str, Any]) -> float:
        """Return the value in a `step` event; NaN: it has none."""
        for part in (event.get("meters"), event.get("losses"), event):
            if isinstance(part, Mapping) and self.name in part:
                return number(part[self.name])
        return math.nan

    def text(self, value: float) -> str:
        """Return a value as people read it."""
        if self.unit == "share":
            return f"{100 * value:.3g} %"
        if self.unit in NATS:
            return f"{value:.4f}"
        shown = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{shown} {self.unit}".rstrip()


NATS = ("nats per token", "nats")
LOSS = Meter("loss", better="lower", unit="nats per token")


def headline_fields(headline: Sequence[Meter], *, comparable: bool) -> dict[str, Any]:
    """Return what `run_start` says of an objective's meters."""
    return {"headline": [asdict(meter) for meter in headline], "comparable_loss": comparable}


def headline_of_start(start: Mapping[str, Any]) -> tuple[tuple[Meter, ...], bool]:
    """Return the meters that a `run_start` event names, and whether its loss is to be shown: of an older run
    the loss alone."""
    try:
        found = tuple(Meter(**fields) for fields in start["headline"])
    except (KeyError, TypeError):
        return (LOSS,), True
    return found, bool(start.get("comparable_loss", True))


def told_step(event: Mapping[str, Any], headline: Sequence[Meter], *, comparable: bool) -> str:
    """Return what a step gave in a few words: "reward 0.98, length 41 tokens"; "": it gave nothing.

    The loss follows where it says something and is not one of the meters, under their name or its own.
    """
    values = [(meter, meter.value(event)) for meter in headline]
    shown = [f"{meter.title} {meter.text(value)}" for meter, value in values if not math.isnan(value)]
    loss = number(event.get("loss"))
    if not math.isnan(loss) and loss not in [value for _, value in values] and (comparable or not shown):
        shown.append(f"loss {loss:.4f}")
    return ", ".join(shown)


def told_progress(events: Iterable[Mapping[str, Any]], headline: Sequence[Meter]) -> str:
    """Return first and last values: "reward 0.11 -> 0.99, held-out pairs right 0 % -> 100 %".

    Args:
        events: the run's, in order.
        headline: its objective's.
    """
    by_step: dict[str, list[float]] = {}
    heldout: dict[str, dict[str, list[float]]] = {}
    for event in events:
        for meter in headline:
            kind, _, field = meter.heldout.partition(".")
            if _has_meters(event) and not math.isnan(value := meter.value(event)):
                by_step.setdefault(meter.name, []).append(value)
            elif meter.heldout and event["event"] == kind:
                of_source = heldout.setdefault(meter.name, {})
                of_source.setdefault(str(event.get("source", "")), []).append(number(event.get(field)))
    parts = [_change(meter, meter.title, by_step[meter.name]) for meter in headline if meter.name in by_step]
    for meter in headline:
        sources = heldout.get(meter.name, {})
        parts += [_change(meter, f"held-out {meter.title}{f' of {name}' if len(sources) > 1 else ''}", values)
                  for name, values in sources.items()]
    return ", ".join(parts)


def _has_meters(event: Mapping[str, Any]) -> bool:
    """Return whether an event is of a step that was learned, or passed over in a round that has meters."""
    return event["event"] == "step" or (event["event"] == "skip" and "meters" in event)


def _change(meter: Meter, title: str, values: Sequence[float]) -> str:
    first, last = meter.text(values[0]), meter.text(values[-1])
    if meter.unit and meter.unit != "share":
        first = first.removesuffix(f" {meter.unit}")  # once is enough
    return f"{title} {last}" if len(values) == 1 else f"{title} {first} -> {last}"
