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


def of_field(name: str, form: str = "", none: str | None = None) -> Callable[[Mapping[str, Any]], str]:
    """Return what gives a field's cell: its text, or its number in a format; `none` where it is absent."""
    def cell(event: Mapping[str, Any]) -> str:
        value = event.get(name)
        if value is None and none is not None:
            return none
        return format(number(value), form) if form else str(value)

    return cell
