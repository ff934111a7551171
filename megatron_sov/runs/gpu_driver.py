"""GPU queries through `nvidia-smi`, which does not initialize CUDA."""

import os
import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = "index,uuid,name,memory.total,memory.used"
_FAULT_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors (ECC)",
    "clocks_throttle_reasons.hw_slowdown": "a hardware slowdown (heat or lack of power)",
    "clocks_throttle_reasons.sw_thermal_slowdown": "a slowdown by its driver for heat"}
"""Field of `nvidia-smi --query-gpu` -> fault, reported for "Active" and positive values."""
_TIMEOUT_S = 120


@dataclass(frozen=True)
class VisibleGpu:
    index: int
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    """Memory used by any process."""


def list_visible_gpus() -> list[VisibleGpu]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES; empty without `nvidia-smi`."""
    gpus = []
    for index, uuid, name, total, used in _query_nvidia_smi(_FIELDS):
        if index.isdigit() and total.isdigit() and used.isdigit():
            gpus.append(VisibleGpu(int(index), uuid, name, int(total) << 20, int(used) << 20))
    device_list = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device_list is None:
        return gpus
    visible = []
    for word in filter(None, (w.strip() for w in device_list.split(","))):
        visible += [g for g in gpus if str(g.index) == word or (word.startswith("GPU-") and
        g.uuid.startswith(word))]
    return visible


def find_gpu_fault(uuid: str) -> str:
    """Return the fault that `nvidia-smi` reports for a GPU, or ""."""
    for field, text in _FAULT_FIELDS.items():
        for gpu_uuid, value in _query_nvidia_smi(f"uuid,{field}"):
            if gpu_uuid == uuid and (value == "Active" or (value.isdigit() and int(value))):
                return f"{value} {text}" if value.isdigit() else text
    return ""


def _query_nvidia_smi(fields: str) -> list[list[str]]:
    """Return the values of `fields` per GPU; empty if `nvidia-smi` is missing, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        # A driver may hang after losing a GPU.
        result = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                                capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in result.stdout.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1]
