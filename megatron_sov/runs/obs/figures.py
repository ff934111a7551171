"""Parse and format numbers in event fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def number(value: Any) -> float:
    """Convert an event field to float; missing and invalid values give NaN. Accepts "nan" and "inf"."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def whole_number(value: Any) -> int:
    """Convert an event field to int; missing and invalid values give 0."""
    parsed = number(value)
    return int(parsed) if math.isfinite(parsed) else 0


Form = str | Callable[[float], str]
"""A format specification or a function that formats a float."""


def of_field(name: str, form: Form = "", none: str | None = None) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that formats field `name` of an event, or returns `none` if the field is missing."""
    def cell(event: Mapping[str, Any]) -> str:
        value = event.get(name)
        if value is None and none is not None:
            return none
        if callable(form):
            return form(number(value))
        return format(number(value), form) if form else str(value)

    return cell
