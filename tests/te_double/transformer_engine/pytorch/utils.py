"""What the real library has for its graphs' memory."""

from __future__ import annotations

from typing import Any


def make_weak_ref(x: Any) -> Any:
    """Return the same: a CPU's graphs share no memory that another capture could be given."""
    return x
