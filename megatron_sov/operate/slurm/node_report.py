"""The record that one rank writes of its node before a start, and `attempts` reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Report:
    """What one rank found in the look at its node (preflight.py)."""

    node: str
    rank: int
    num_gpus: int = 0
    """GPUs that torch sees on the node: all of them, or this rank's alone."""
    gpu_uuid: str = ""
    """Which one is this rank's."""
    gpu_used_bytes: int = 0
    """Memory on it that was in use before this look began."""
    gpu_illness: str = ""
    """What its driver says is wrong with it: memory errors, heat, lack of power."""
    transformer_engine_error: str = ""
    """What it raised on import; empty: it imports, or nobody asked."""
    free_disk_bytes: int = 0
    """Free space on the scratch folder's disk."""
    disk_error: str = ""
    """Why a file could not be written there; empty: it could."""
    matmul_s: float = 0.0
    """Shortest of some matrix products, of the product alone."""
    matmul_tflops: float = 0.0
    checksum: float = 0.0
    """Sum of the product of two matrices of small whole numbers: the same on every rank."""
    clock_skew_s: float | None = None
    """Clock against the median of all ranks, right after a barrier."""
    allreduce_s: float | None = None
    """Seconds of the second all-reduce; None: it did not come to that."""
    error: str = ""
    """What was raised on the way."""
