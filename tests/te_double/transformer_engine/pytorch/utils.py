"""Weak references for graph memory, and the version of cuDNN."""

from __future__ import annotations

from typing import Any

from . import placement


def make_weak_ref(x: Any) -> Any:
    """Return `x` itself: graphs of the double do not share memory, so a strong reference is harmless."""
    return x


def get_cudnn_version() -> tuple[int, int, int]:
    """Return the cuDNN version of the simulated chip."""
    return placement.CHIP.cudnn
