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


def whole_number(value: Any) -> int:
    """Return an event's whole number; 0: it is absent or unreadable."""
    found = number(value)
    return int(found) if math.isfinite(found) else 0


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
