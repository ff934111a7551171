"""Limits that the kernel keeps for a process."""

from __future__ import annotations

import resource


def limit(kind: int, most: float) -> None:
    """Let this process and those that it starts have no more, or less where the machine has a lower limit."""
    hard = resource.getrlimit(kind)[1]
    value = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
    resource.setrlimit(kind, (value, value))
