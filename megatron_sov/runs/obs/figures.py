"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def number(value: Any) -> float:
    """Return an event's number as a float; absent and unreadable values are NaN ("nan",
    "inf" are spelt as text)."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def large(value: float) -> str:
    """Return a count in thousands, millions, billions or trillions, e.g. 102.7 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def size(num_bytes: float) -> str:
    """Return a size in the largest unit of which there is one, e.g. 1.5 GB, 12 kB."""
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, e.g. 3 d 4 h, 12 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {smaller}"
    raise AssertionError(f"no unit for {seconds} s")


def figure(value: float, digits: int = 4) -> str:
    """Return a measured value with so many significant digits; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


Form = str | Callable[[float], str]
"""A format specification, or a function that formats a number."""


def of_field(name: str, form: Form = "", none: str | None = None) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that formats a field of an event; `none` is its result if the field is absent."""
    def cell(event: Mapping[str, Any]) -> str:
        value = event.get(name)
        if value is None and none is not None:
            return none
        if callable(form):
            return form(number(value))
        return format(number(value), form) if form else str(value)

    return cell
