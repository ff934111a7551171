"""How well a step used its machine: model FLOPs, their share of the GPU's peak, memory."""

from __future__ import annotations

import math
import resource
import sys

import torch

from megatron_sov.clusters.chips import of_device
from megatron_sov.config import RunConfig
from megatron_sov.mcore.parallel.device import on_gpu
from megatron_sov.models.count import train_flops_per_token
from megatron_sov.obs.telemetry.nvml import open_meter
from megatron_sov.runs.launch_environment import is_first

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""What the system counts a process's memory in."""

CARD_TFLOPS = {"NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H200 NVL": 835.5}
"""What CUDA calls cards for PCIe, which are in no table of chips -> dense peak in bf16, half of a data
sheet's figure with sparsity."""


def peak_tflops(device_name: str) -> float | None:
    """Return the dense peak of a GPU in bf16, TFLOP/s, by CUDA's name for it; None: it is not known."""
    chip = of_device(device_name)
    return chip.bf16_flops_per_s / 1e12 if chip else CARD_TFLOPS.get(device_name)


class Efficiency:
    """The figures of a step, for this process."""

    def __init__(self, config: RunConfig, num_ranks: int) -> None:
        known = peak_tflops(torch.cuda.get_device_name()) if on_gpu() else None
        self._meter = (open_meter(_own_uuid(), tells=is_first())
                       if config.obs.nvml and on_gpu() else None)
        self._model, self._num_ranks = config.model, num_ranks
        self._peak_tflops = config.gpu.peak_tflops or known

    def figures(self, num_tokens: int, seq_len: int, seconds: float) -> dict[str, float]:
        """Return field of a `step` event -> value; `energy_j` is what the GPU took since the last one.

        Args:
            num_tokens: tokens of the step, over all processes.
            seq_len: tokens of a row's samples.
            seconds: the step's time.
        """
        per_process = num_tokens / seconds / self._num_ranks
        tflops = per_process * train_flops_per_token(self._model, seq_len) / 1e12
        found = {"tokens_per_s_per_process": per_process, "tflops_per_process": tflops}
        if self._peak_tflops:
            found["mfu"] = tflops / self._peak_tflops
        if self._meter is not None:
            found |= self._meter.figures()
        return found | peak_memory()

    @property
    def gpu_uuid(self) -> str:
        """The driver's name for this process's GPU; empty: it is not asked."""
        return "" if self._meter is None else self._meter.uuid

    def energy_j(self) -> float:
        """Return what this process's GPU has taken since this was made, in joules; NaN: nobody tells."""
        return math.nan if self._meter is None else self._meter.total_j()

    def close(self) -> None:
        """Ask the driver no more."""
        if self._meter is not None:
            self._meter.close()


def _own_uuid() -> str:
    """Return CUDA's name for this process's GPU."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process has had so far: on its GPU, else of the host."""
    if on_gpu():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved()}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES}
