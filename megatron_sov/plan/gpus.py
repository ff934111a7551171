"""The GPUs that recipes have layouts for, and how much of their memory a run may plan with."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
USABLE_SHARE = 0.9
"""Share of a GPU's memory that an account may fill: the rest is for what it leaves out, the CUDA context,
the communication library's buffers and the allocator's gaps.  Our choice; not measured yet."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    """As people call it."""
    memory_bytes: int
    """What CUDA reports, which is less than its name says."""


GPUS = {"h100": Gpu("H100-80GB", 79 * GIB), "h200": Gpu("H200-141GB", 139 * GIB),
        "b200": Gpu("B200-192GB", 178 * GIB)}
"""Name in cluster profiles and recommended layouts -> GPU."""
