"""Headline meters: which columns of a run's steps tell whether it learns what it is for.

An objective names them, the event `run_start` carries them, and the progress bar, `status`, the last line and
reports are views of them.  Light on purpose: it imports nothing heavy and reads no files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from megatron_sov.runs.obs.figures import number, whole_number
from megatron_sov.runs.obs.validation import VALIDATION

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


class HeldoutFigures:
    """Collects a run's figures on held-out data, event by event: their values before the first step and at
    the last evaluation are of the same data, unlike the losses of two batches."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        self._losses: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Take one event in."""
        if event["event"] == "eval" and isinstance(event.get("heldout"), Mapping):
            for source, figures in event["heldout"].items():
                if not isinstance(figures, Mapping):
                    continue
                found = self._losses.setdefault(source, [])
                # The first and the last evaluation are enough.
                found[1:] = [(whole_number(event.get("step")), figures)]
        elif (kind := str(event["event"])) == VALIDATION or kind.startswith("heldout_"):
            self._by_kind.setdefault(kind, {}).setdefault(str(event.get("source", "")), []).append(event)

    def text(self, headline: Sequence[Meter], has_loss: Callable[[str], bool]) -> str:
        """Return "held-out pairs right 50 % -> 100 %, held-out loss web 3.8210 -> 3.7504"; "": no figures.

        Args:
            headline: the objective's meters.
            has_loss: source -> whether its held-out loss says something.
        """
        parts = []
        for meter in headline:
            kind, _, name = meter.heldout.partition(".")
            sources = self._by_kind.get(kind, {}) if kind else {}
            for source, events in sources.items():
                title = f"held-out {meter.title}{f' of {source}' if len(sources) > 1 else ''}"
                # Of a later `eval pairs --run`, which has no reference, there are no numbers.
                values = [value for event in events if math.isfinite(value := number(event.get(name)))]
                parts += [_change(meter, title, values)] if values else []
        losses = []
        for source, found in self._losses.items():
            (step, first), (_, last) = found[0], found[-1]
            same_data = step == 0 and first.get("tokens") == last.get("tokens")
            values = [number(one.get("loss")) for one in ([first, last] if same_data else [last])]
            if has_loss(source):
                losses.append(_change(LOSS, source, values[:len(found)]).removesuffix(f" {LOSS.unit}"))
        return ", ".join([*parts, *([f"held-out loss {', '.join(losses)}"] if losses else [])])


MEAN_STEPS = 10
"""Last steps of which a closing line shows the mean."""


def recent_means(events: Iterable[Mapping[str, Any]], headline: Sequence[Meter]) -> str:
    """Return the means of an objective's meters over the last steps: "reward 0.97, loss 2.5 (mean of the last
    10 steps)"; "": no step has them.

    Args:
        events: the run's, in order.
        headline: its objective's meters.
    """
    values: dict[str, deque[float]] = {meter.name: deque(maxlen=MEAN_STEPS) for meter in headline}
    for event in events:
        for meter in headline if _has_meters(event) else ():
            if not math.isnan(value := meter.value(event)):
                values[meter.name].append(value)
    shown = [f"{meter.title} {meter.text(fmean(values[meter.name]))}" for meter in headline
             if values[meter.name]]
    count = max(map(len, values.values()), default=0)
    if not shown:
        return ""
    return f"{', '.join(shown)} ({f'mean of the last {count} steps' if count > 1 else 'one step'})"


def _has_meters(event: Mapping[str, Any]) -> bool:
    """Return whether an event is of a step that was learned, or passed over in a round that has meters."""
    return event["event"] == "step" or (event["event"] == "skip" and "meters" in event)


def _change(meter: Meter, title: str, values: Sequence[float]) -> str:
    first, last = meter.text(values[0]), meter.text(values[-1])
    if meter.unit and meter.unit != "share":
        first = first.removesuffix(f" {meter.unit}")  # once is enough
    return f"{title} {last}" if len(values) == 1 else f"{title} {first} -> {last}"
