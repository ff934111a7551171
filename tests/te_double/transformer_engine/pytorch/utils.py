"""Weak references for graph memory, and the version of cuDNN."""

from __future__ import annotations

from typing import Any

from . import placement


def make_weak_ref(x: Any) -> Any:
    """Return the same: a CPU's graphs share no memory that another capture could be given."""
    return x


def get_cudnn_version() -> tuple[int, int, int]:
    """Return the version that the chip's machine has."""
    return placement.CHIP.cudnn
