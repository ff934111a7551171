"""The GPUs of this machine as their driver sees them: by `nvidia-smi`, which does not start CUDA, and by NVML
while a run goes on.

A thread asks NVML once a second: a driver that has lost its GPU may not answer for minutes, and training does
not wait for it.  Energy is the driver's own counter (since Volta); where it has none, power is summed over
time.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import warn

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


EVERY_S = 1.0
FRESH_S = 10.0
"""Older readings are not told: a driver that has fallen silent must not look like a steady GPU."""
CLOSE_S = 1.0
"""How long the end of a run waits for the thread."""


class GpuMeter:
    """Power, energy, use and temperature of one GPU."""

    def __init__(self, uuid: str, nvml: Any, every_s: float = EVERY_S, *, tells: bool = True) -> None:
        """Begin to ask.

        Args:
            uuid: the driver's name for the GPU, GPU-....
            nvml: the module `pynvml`.
            every_s: seconds between two readings.
            tells: whether this process says so where the driver does not answer.
        """
        self.uuid = uuid
        """The driver's name for the GPU."""
        self._nvml, self._every_s, self._tells = nvml, every_s, tells
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._figures: dict[str, float] = {}
        self._read_s = -math.inf
        self._total_j, self._told_j = 0.0, 0.0
        self._has_energy = False
        self._counter_j: float | None = None
        self._power: tuple[float, float] | None = None
        self._thread = threading.Thread(target=self._watch, name="gpu meter", daemon=True)
        self._thread.start()

    def figures(self) -> dict[str, float]:
        """Return field of a `step` event -> value: `energy_j` since the last call, of `energy_gpus` 1, and
        the newest power, use (0 to 1) and temperature; what the driver does not tell is left out."""
        with self._lock:
            fresh = time.monotonic() - self._read_s <= FRESH_S
            found = dict(self._figures) if fresh else {}
            if self._has_energy:
                found["energy_j"], self._told_j = self._total_j - self._told_j, self._total_j
                found["energy_gpus"] = 1
            return found

    def total_j(self) -> float:
        """Return the energy since this meter was made, in joules; NaN: the driver does not tell."""
        with self._lock:
            return self._total_j if self._has_energy else math.nan

    def close(self) -> None:
        self._closed.set()
        self._thread.join(CLOSE_S)

    def _watch(self) -> None:
        try:
            self._nvml.nvmlInit()
            # By UUID: an index means another GPU under CUDA_VISIBLE_DEVICES.
            handle = self._nvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except self._nvml.NVMLError as e:
            if self._tells:
                warn(f"GPU {self.uuid}: its driver does not tell what it takes ({e}); the run goes on")
            return
        while True:
            self._read(handle)
            if self._closed.wait(self._every_s):
                return

    def _read(self, handle: Any) -> None:
        """Take one reading; each figure is missing where the GPU does not have it."""
        power_w = self._ask("nvmlDeviceGetPowerUsage", handle) / 1000
        counter_j = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle) / 1000
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        celsius = self._ask("nvmlDeviceGetTemperature", handle, sensor)
        if math.isnan(celsius):  # the first is to go with CUDA 14, which the second came before
            celsius = self._ask("nvmlDeviceGetTemperatureV", handle, sensor)
        found = {"gpu_power_w": power_w, "gpu_temperature_c": celsius,
                 "gpu_utilization": self._ask("nvmlDeviceGetUtilizationRates", handle, part="gpu") / 100}
        now_s = time.monotonic()
        with self._lock:
            self._figures = {name: value for name, value in found.items() if math.isfinite(value)}
            if self._figures or math.isfinite(counter_j):
                self._read_s = now_s
            self._add_energy(counter_j, power_w, now_s)

    def _add_energy(self, counter_j: float, power_w: float, now_s: float) -> None:
        """Count what was used since the last reading."""
        if math.isfinite(counter_j):
            if self._counter_j is not None:
                # it begins anew when the driver is loaded again
                self._total_j += max(0.0, counter_j - self._counter_j)
            self._counter_j, self._has_energy = counter_j, True
        elif math.isfinite(power_w) and self._counter_j is None:
            if self._power is not None:
                then_s, then_w = self._power
                # Trapezoids between two readings of power.
                self._total_j += (now_s - then_s) * (power_w + then_w) / 2
            self._power, self._has_energy = (now_s, power_w), True

    def _ask(self, question: str, *arguments: Any, part: str = "") -> float:
        """Return an answer, or its `part`; NaN: there is none."""
        try:
            answer = getattr(self._nvml, question)(*arguments)
        except (self._nvml.NVMLError, AttributeError):  # not on this GPU, or not in this library
            return math.nan
        return float(getattr(answer, part) if part else answer)


def open_meter(uuid: str, *, tells: bool = True) -> GpuMeter | None:
    """Return a meter of a GPU; None where `pynvml` is not installed, or no GPU is named.

    Args:
        uuid: CUDA's name for the GPU, with or without GPU- before it; "": there is none.
        tells: as in `GpuMeter`; of thousands of processes one is enough.
    """
    if not uuid:
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    return GpuMeter(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}", nvml, tells=tells)
