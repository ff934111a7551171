"""Bounds of settings: what comes from a folder of others reserves no more than a codec can want."""

from __future__ import annotations

import math


def outside(settings: object, **bounds: tuple[float, float]) -> list[str]:
    """Return one sentence for every field of `settings` that lies outside its bounds, both of them allowed.

    Args:
        settings: holds the fields; a field may hold a tuple, each item of which is looked at.
        bounds: field -> smallest and largest value.
    """
    found = []
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        items = value if isinstance(value, tuple) else (value,)
        if any(not math.isfinite(item) or not low <= item <= high for item in items):
            found.append(f"{name} = {value!r} must be from {low:,} to {high:,}")
    return found
