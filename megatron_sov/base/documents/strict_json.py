"""JSON as files of rows have it: what Python's lets through and JSON does not know, and lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity (`parse_constant`); raises ValueError."""
    raise ValueError(f"{name} is no JSON")


def finite(text: str) -> float:
    """Return a number (`parse_float`); raises ValueError where it would be written as Infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is more than a float holds")
    return number


def json_line(row: Any, *, allow_nan: bool = True) -> bytes:
    """Return a value as a line of JSON; raises TypeError and ValueError where it is none."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=allow_nan).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(row, allow_nan=allow_nan).encode() + b"\n"


def changed_values(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, old and new value, as `short_json` has them, of all in which two trees differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(k for k in before if k not in now)]:
            yield from changed_values(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, short_json(before), short_json(now)


def short_json(value: Any) -> str:
    """Return a value as JSON for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
