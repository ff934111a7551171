"""Text of people in YAML, which reads 2025-07-24 as a date and 2025 as a number."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_written(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_written)]
"""A text that may look like a number or a date."""
