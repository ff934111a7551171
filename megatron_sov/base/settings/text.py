"""A settings type for text that YAML may read as a number or a date (2025, 2025-07-24)."""

from typing import Annotated, Any

from pydantic import BeforeValidator


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_to_text)]
"""Text; numbers and dates from YAML are converted to text."""
