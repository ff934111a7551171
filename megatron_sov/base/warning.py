"""Warnings: a line for who looks on now, and an event for who looks later."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Record = Callable[..., None]
"""Writes an event: `record(name, **fields)`, as `EventLog.write` does."""


def warn(text: str, record: Record | None = None, event: str = "warning", **fields: Any) -> None:
    """Say something on standard error, and record it.

    Args:
        text: what is to be known, in words.
        record: writes the event; None: it is only said.
        event: name of the event, which gets `text` beside its fields.
        fields: what else it tells, such as `step`.
    """
    # one write: lines of other processes must not come in between
    print(f"warning: {text}\n", end="", file=sys.stderr, flush=True)
    if record is not None:
        record(event, **fields, text=text)
