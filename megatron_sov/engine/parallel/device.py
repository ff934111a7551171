"""This process's device (CUDA or CPU), and pinned host memory for copies."""

import gc
import os
from typing import Literal

import torch

from layout_proof.cpu_shims import is_cpu_only
from megatron_sov.runs.launch_environment import local_gpu_index

CPU = torch.device("cpu")
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""`train.precision` -> dtype for weights and activations."""
ARENA_BYTES = 1 << 30
"""Size of a piece of pinned memory."""
_ALIGN_BYTES = 64

def on_gpu() -> bool:
    """Return whether this process computes on a CUDA device, not on CPU shims, without starting CUDA."""
    # ask the driver: torch's default check starts CUDA, and a forked process could not use it afterwards
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return not is_cpu_only() and torch.cuda.is_available()


def choose_inference_precision() -> Literal["bf16", "fp32"]:
    """Return the default `train.precision` for inference: bf16 on GPUs, fp32 on CPUs.

    It does not depend on the engine or the dtype of stored weights, so a checkpoint and its Hugging Face
    folder generate the same text."""
    return "bf16" if on_gpu() else "fp32"


def get_local_device() -> torch.device:
    """Return the device for parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else CPU


def describe_local_device() -> str:
    """Return this process's device by name ("cuda:1", "cpu"), equal in every thread."""
    return f"cuda:{local_gpu_index(torch.cuda.device_count())}" if on_gpu() else "cpu"


def release_gpu_memory() -> None:
    """Release cached GPU memory, for example from a deleted model."""
    if on_gpu():
        gc.collect()
        torch.cuda.empty_cache()  # does not start CUDA


def toggle_nsys_recording(*, on: bool) -> None:
    """Start or stop recording in nsys, with Megatron-Core's NVTX ranges. Records nothing without nsys."""
    # the package imports this module before it prepares the process for megatron
    from megatron.core.utils import configure_nvtx_profiling

    configure_nvtx_profiling(on)
    torch.cuda.synchronize()
    (torch.cuda.profiler.start if on else torch.cuda.profiler.stop)()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device; to a GPU through pinned memory, without blocking."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class PinnedArena:
    """Allocates pinned host memory in few large pieces: torch rounds each allocation up to a power of two."""

    def __init__(self, total_bytes: int) -> None:
        self._piece_bytes = min(ARENA_BYTES, total_bytes + _ALIGN_BYTES)
        self._free = torch.empty(0, dtype=torch.uint8)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Allocate contiguous memory with the shape and dtype of `tensor`."""
        needed_bytes = -(-count_bytes(tensor) // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._free.numel() < needed_bytes:
            self._free = torch.empty(max(needed_bytes, self._piece_bytes), dtype=torch.uint8,
                                     pin_memory=on_gpu())
        memory, self._free = self._free[:needed_bytes], self._free[needed_bytes:]
        return memory[:count_bytes(tensor)].view(tensor.dtype).view(tensor.shape)


def count_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
