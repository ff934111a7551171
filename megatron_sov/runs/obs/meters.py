"""Headline meters: the columns of `step` events that show whether training works.

The objective defines the meters and `run_start` records them. Progress bar, `status` and reports display
them. This module must import quickly and access no files.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from megatron_sov.runs.obs.figures import parse_number, parse_whole_number
from megatron_sov.runs.obs.validation import VALIDATION

Better = Literal["higher", "lower", ""]
NATS = ("nats per token", "nats")
MEAN_STEPS = 10
"""Number of steps averaged in a closing line."""


@dataclass(frozen=True)
class Meter:
    """A column of `step` events."""

    name: str
    """Key in `meters`, in `losses` or in the event."""
    label: str = ""
    """Display name; empty: `name` with spaces."""
    unit: str = ""
    """Suffix after the value; "share" formats the value in percent."""
    better: Better = ""
    """Direction of progress, empty for none."""
    heldout: str = ""
    """Held-out event and field of the same quantity before the first and after the last step, e.g.
    "heldout_pairs.right"; may be empty."""

    @property
    def title(self) -> str:
        return self.label or self.name.replace("_", " ")

    def value(self, event: Mapping[str, Any]) -> float:
        """Return the meter's value in a `step` event, or NaN."""
        for part in (event.get("meters"), event.get("losses"), event):
            if isinstance(part, Mapping) and self.name in part:
                return parse_number(part[self.name])
        return math.nan

    def text(self, value: float) -> str:
        if self.unit == "share":
            return f"{100 * value:.3g} %"
        if self.unit in NATS:
            return f"{value:.4f}"
        number = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()


LOSS = Meter("loss", better="lower", unit="nats per token")


def build_headline_fields(headline: Sequence[Meter], *, comparable: bool) -> dict[str, Any]:
    """Build the `run_start` fields that record an objective's meters."""
    return {"headline": [asdict(meter) for meter in headline], "comparable_loss": comparable}


def read_headline(start: Mapping[str, Any]) -> tuple[tuple[Meter, ...], bool]:
    """Return the meters in a `run_start` event, and whether to display its loss; old runs have only it."""
    try:
        meters = tuple(Meter(**fields) for fields in start["headline"])
    except (KeyError, TypeError):
        return (LOSS,), True
    return meters, bool(start.get("comparable_loss", True))


def format_step(event: Mapping[str, Any], headline: Sequence[Meter], *, comparable: bool) -> str:
    """Format a step's meters, e.g. "reward 0.98, length 41 tokens"; empty without values.

    Append the loss if it is comparable (or no meter has a value) and no meter already shows it.
    """
    values = [(meter, meter.value(event)) for meter in headline]
    parts = [f"{meter.title} {meter.text(value)}" for meter, value in values if not math.isnan(value)]
    loss = parse_number(event.get("loss"))
    if not math.isnan(loss) and loss not in [value for _, value in values] and (comparable or not parts):
        parts.append(f"loss {loss:.4f}")
    return ", ".join(parts)


class HeldoutFigures:
    """Collects held-out figures from events. Values before the first step and after the last use the same
    data, unlike training losses."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        self._losses: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "eval" and isinstance(event.get("heldout"), Mapping):
            for source, figures in event["heldout"].items():
                if not isinstance(figures, Mapping):
                    continue
                evaluations = self._losses.setdefault(source, [])
                # Keep the first and the last evaluation.
                evaluations[1:] = [(parse_whole_number(event.get("step")), figures)]
        elif (kind := str(event["event"])) == VALIDATION or kind.startswith("heldout_"):
            self._by_kind.setdefault(kind, {}).setdefault(str(event.get("source", "")), []).append(event)

    def text(self, headline: Sequence[Meter], has_loss: Callable[[str], bool]) -> str:
        """Format figures, e.g. "held-out pairs right 50 % -> 100 %, held-out loss web 3.8210 -> 3.7504".

        Args:
            headline: the objective's meters.
            has_loss: source -> whether its held-out loss is meaningful.
        """
        parts = []
        for meter in headline:
            kind, _, name = meter.heldout.partition(".")
            sources = self._by_kind.get(kind, {}) if kind else {}
            for source, events in sources.items():
                title = f"held-out {meter.title}{f' of {source}' if len(sources) > 1 else ''}"
                # A later `eval pairs --run` without reference records no numbers.
                values = [value for event in events if math.isfinite(value := parse_number(event.get(name)))]
                parts += [_format_change(meter, title, values)] if values else []
        losses = []
        for source, evaluations in self._losses.items():
            (step, first), (_, last) = evaluations[0], evaluations[-1]
            same_data = step == 0 and first.get("tokens") == last.get("tokens")
            figures = [first, last] if same_data else [last]
            values = [parse_number(entry.get("loss")) for entry in figures]
            if has_loss(source):
                change = _format_change(LOSS, source, values[:len(evaluations)])
                losses.append(change.removesuffix(f" {LOSS.unit}"))
        if losses:
            parts.append(f"held-out loss {', '.join(losses)}")
        return ", ".join(parts)


def format_recent_means(events: Iterable[Mapping[str, Any]], headline: Sequence[Meter]) -> str:
    """Format the meters' means over the last steps, e.g. "reward 0.97, loss 2.5 (mean of the last 10 steps)".

    Args:
        events: the run's events in order.
        headline: the objective's meters.
    """
    values: dict[str, deque[float]] = {meter.name: deque(maxlen=MEAN_STEPS) for meter in headline}
    for event in events:
        for meter in headline if _has_meters(event) else ():
            if not math.isnan(value := meter.value(event)):
                values[meter.name].append(value)
    parts = [f"{meter.title} {meter.text(fmean(values[meter.name]))}" for meter in headline
             if values[meter.name]]
    count = max(map(len, values.values()), default=0)
    if not parts:
        return ""
    return f"{', '.join(parts)} ({f'mean of the last {count} steps' if count > 1 else 'one step'})"


def _has_meters(event: Mapping[str, Any]) -> bool:
    return event["event"] == "step" or (event["event"] == "skip" and "meters" in event)


def _format_change(meter: Meter, title: str, values: Sequence[float]) -> str:
    first, last = meter.text(values[0]), meter.text(values[-1])
    if meter.unit and meter.unit != "share":
        first = first.removesuffix(f" {meter.unit}")  # the unit follows the second value
    return f"{title} {last}" if len(values) == 1 else f"{title} {first} -> {last}"
