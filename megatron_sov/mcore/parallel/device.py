"""Where this process computes: on its CUDA device, or on the CPU once the shims for it are in place."""

from __future__ import annotations

import gc
import os

import torch

CPU = torch.device("cpu")
_on_cpu = False


def compute_on_cpu() -> None:
    """Note that the CPU shims are in place: from now on `torch.cuda` answers for the CPU and no longer
    says what is there."""
    global _on_cpu
    _on_cpu = True


def computes_on_cpu() -> bool:
    """Return whether the CPU shims are in place."""
    return _on_cpu


def on_gpu() -> bool:
    """Return whether this process computes on a CUDA device; does not start CUDA."""
    # the driver's own answer: torch's usual question starts CUDA, and a fork of this process could not use it
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return not _on_cpu and torch.cuda.is_available()


def local_device() -> torch.device:
    """Return the device of this process's parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else CPU


def release_unused() -> None:
    """Give the memory of a model that is gone back to the device, for what this process does next."""
    if on_gpu():
        gc.collect()
        torch.cuda.empty_cache()  # which starts no CUDA where there is none yet


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the host on a device; to a GPU they go from pinned memory, so that nobody waits."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
