"""Parse and format numbers in event fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

NumberFormat = str | Callable[[float], str]
"""A format specification or a function that formats a float."""


def parse_number(value: Any) -> float:
    """Convert an event field to float; missing and invalid values give NaN. Accepts "nan" and "inf"."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def parse_whole_number(value: Any) -> int:
    """Convert an event field to int; missing and invalid values give 0."""
    parsed = parse_number(value)
    return int(parsed) if math.isfinite(parsed) else 0


def field_formatter(name: str, form: NumberFormat = "",
                    none: str | None = None) -> Callable[[Mapping[str, Any]], str]:
    """Build a formatter for field `name` of an event; a missing field gives `none`."""
    def cell(event: Mapping[str, Any]) -> str:
        value = event.get(name)
        if value is None and none is not None:
            return none
        if callable(form):
            return form(parse_number(value))
        return format(parse_number(value), form) if form else str(value)

    return cell
