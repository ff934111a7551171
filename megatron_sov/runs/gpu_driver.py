"""The GPUs of this machine as their driver sees them: by `nvidia-smi`, which does not start CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = "index,uuid,name,memory.total,memory.used"
_ILLNESSES = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors (ECC)",
    "clocks_throttle_reasons.hw_slowdown": "a hardware slowdown (heat or lack of power)",
    "clocks_throttle_reasons.sw_thermal_slowdown": "a slowdown by its driver for heat",
}
"""Field of `nvidia-smi --query-gpu` -> what is wrong where it is neither 0, not active, nor unknown."""
_TIMEOUT_S = 120


@dataclass(frozen=True)
class SeenGpu:
    """One GPU."""

    index: int
    """Its number in the machine."""
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    """Memory that processes have taken, whoever's they are."""


def visible_gpus() -> list[SeenGpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves to this process; none where nobody can tell."""
    gpus = []
    for index, uuid, name, total, used in _query(_FIELDS):
        if index.isdigit() and total.isdigit() and used.isdigit():
            gpus.append(SeenGpu(int(index), uuid, name, int(total) << 20, int(used) << 20))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    found = []
    for word in filter(None, (w.strip() for w in chosen.split(","))):
        found += [g for g in gpus if str(g.index) == word or (word.startswith("GPU-") and
        g.uuid.startswith(word))]
    return found


def illness(uuid: str) -> str:
    """Return what the driver says is wrong with a GPU; empty: nothing, or it does not tell."""
    for field, text in _ILLNESSES.items():
        for found, value in _query(f"uuid,{field}"):
            if found == uuid and (value == "Active" or (value.isdigit() and int(value))):
                return f"{value} {text}" if value.isdigit() else text
    return ""


def _query(fields: str) -> list[list[str]]:
    """Return the values of some fields for each GPU; empty where the program is missing, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        # A driver that has lost a GPU may hang, so there is a limit.
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1]
