"""What GPUs can do at most: dense TFLOP/s of one GPU's tensor cores, by its name.

NVIDIA's data sheets give twice as much, with sparsity: H100, H200, HGX B200 and GB200 NVL72 (of the last two
a GPU's share of the machine's figure).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One kind of GPU."""

    name: str
    """Part of what CUDA calls it."""
    bf16_tflops: float


PEAKS = (
    Peak("GB200", 2500),
    Peak("B200", 2250),
    Peak("H200 NVL", 835.5),
    Peak("H200", 989.5),
    Peak("H100 NVL", 835.5),
    Peak("H100 PCIe", 756),
    Peak("H100", 989.5),
)
"""The first whose name occurs counts; an H100 or H200 that says no more is of the SXM form."""


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a GPU in bf16 by CUDA's name for it, or None where it is not known."""
    found = next((peak for peak in PEAKS if peak.name in device_name), None)
    return None if found is None else found.bf16_tflops
