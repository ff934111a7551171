"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float:
    """Return an event's number as a float; absent and unreadable values are NaN ("nan",
    "inf" are spelt as text)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def large(value: float) -> str:
    """Return a count in thousands, millions, billions or trillions, e.g. 102.7 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


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
