"""Parse and format numbers in event fields."""

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


def combine_bits_per_byte(heldout: Any) -> float:
    """Return total bits over total bytes of an `eval` event's sources, without sources that lack a figure;
    NaN if none is left. A source has `bits / bits_per_byte` bytes."""
    bits = num_bytes = 0.0
    for source in heldout.values() if isinstance(heldout, dict) else ():
        if isinstance(source, dict):
            source_bits = parse_number(source.get("loss")) * parse_number(source.get("tokens")) / math.log(2)
            bits_per_byte = parse_number(source.get("bits_per_byte"))
            # NaN if the tokenizer has no bytes per token
            if math.isfinite(source_bits) and 0 < bits_per_byte < math.inf:
                bits += source_bits
                num_bytes += source_bits / bits_per_byte
    return bits / num_bytes if num_bytes > 0 else math.nan


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
