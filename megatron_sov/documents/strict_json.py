"""What Python's JSON lets through and JSON does not know, for the hooks of `json.loads`."""

from __future__ import annotations

import math
from typing import NoReturn


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity (`parse_constant`); raises ValueError."""
    raise ValueError(f"{name} is no JSON")


def finite(text: str) -> float:
    """Return a number (`parse_float`); raises ValueError where it would be written as Infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is more than a float holds")
    return number
