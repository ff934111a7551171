"""A GPU's energy, power, use and temperature, from a double whose functions have `pynvml`'s signatures."""

from __future__ import annotations

import inspect
import threading
import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from megatron_sov.runs import gpu_driver
from megatron_sov.runs.gpu_driver import GpuMeter, open_meter

UUID = "GPU-0a1b"


class Double:
    """The part of `pynvml` that is used, over a GPU of 400 W."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self, has_energy: bool = True) -> None:
        self.has_energy, self.millijoules, self.is_lost = has_energy, 5_000_000, False
        self.reads = threading.Semaphore(0)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return 400_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.has_energy or self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.millijoules

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=75, memory=20)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        self.reads.release()
        return 61


def meter(double: Double) -> GpuMeter:
    """Return a meter of the double; it reads again and again."""
    return GpuMeter(UUID, double, every_s=0.002)


def wait(double: Double, readings: int = 3) -> None:
    while double.reads.acquire(blocking=False):
        pass
    for _ in range(readings):
        assert double.reads.acquire(timeout=600)


@pytest.mark.parametrize("name", [n for n in dir(Double) if n.startswith("nvml")])
def test_the_double_has_the_signatures_of_the_library(name: str) -> None:
    theirs = list(inspect.signature(getattr(pynvml, name)).parameters)
    assert list(inspect.signature(getattr(Double, name)).parameters)[1:] == theirs
    assert pynvml.c_nvmlUtilization_t._fields_[0][0] == "gpu"


def test_energy_is_the_difference_of_the_drivers_counter() -> None:
    double = Double()
    found = meter(double)
    wait(double)
    assert found.figures() == {"gpu_power_w": 400.0, "gpu_utilization": 0.75, "gpu_temperature_c": 61.0,
                               "energy_j": 0.0, "energy_gpus": 1}
    double.millijoules += 123_000
    wait(double)
    assert found.figures()["energy_j"] == pytest.approx(123.0)
    double.millijoules = 7_000  # the driver was loaded anew
    wait(double)
    assert found.figures()["energy_j"] == 0.0
    double.millijoules += 2_000
    wait(double)
    assert (found.figures()["energy_j"], found.total_j()) == pytest.approx((2.0, 125.0))
    found.close()


def test_without_a_counter_power_is_summed_over_time() -> None:
    double, start_s = Double(has_energy=False), time.monotonic()
    found = meter(double)
    wait(double, 10)
    energy_j, most_s = found.total_j(), time.monotonic() - start_s
    found.close()
    assert 0 < energy_j <= 400 * most_s


def test_old_figures_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    double = Double()
    found = meter(double)
    wait(double)
    monkeypatch.setattr(gpu_driver, "FRESH_S", -1.0)
    assert set(found.figures()) == {"energy_j", "energy_gpus"}
    found.close()


def test_a_figure_that_the_driver_refuses_is_missing_alone() -> None:
    double = Double()
    double.is_lost = True
    found = meter(double)
    wait(double)
    assert found.figures() == {"gpu_utilization": 0.75, "gpu_temperature_c": 61.0}
    assert str(found.total_j()) == "nan"
    found.close()


def test_an_unknown_gpu_is_told_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    found = GpuMeter("GPU-none", Double())
    found.close()
    assert found.figures() == {} and str(found.total_j()) == "nan"
    assert "GPU GPU-none: its driver does not tell" in capsys.readouterr().err


def test_the_newer_question_for_the_temperature_is_asked_where_the_older_is_gone() -> None:
    class Newer(Double):
        def nvmlDeviceGetTemperatureV(self, handle: str, sensor: int, version: int = 0) -> int:
            return Double.nvmlDeviceGetTemperature(self, handle, sensor) + 1

        @property
        def nvmlDeviceGetTemperature(self) -> Any:  # type: ignore[override]
            raise AttributeError("gone")

    theirs = inspect.signature(pynvml.nvmlDeviceGetTemperatureV)
    assert list(theirs.parameters) == ["handle", "sensor", "version"]
    double = Newer()
    found = meter(double)
    wait(double)
    assert found.figures()["gpu_temperature_c"] == 62.0
    found.close()


def test_a_driver_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    double, release, answered = Double(), threading.Event(), threading.Event()

    def hang(handle: str) -> int:
        release.wait(600)
        answered.set()
        return 1

    monkeypatch.setattr(double, "nvmlDeviceGetPowerUsage", hang)
    monkeypatch.setattr(gpu_driver, "CLOSE_S", 0.05)
    found = meter(double)
    assert found.figures() == {}
    found.close()
    assert not answered.is_set(), "nobody has waited for its answer"
    release.set()


def test_a_machine_without_a_gpu_or_the_library_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_meter("") is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert open_meter("0a1b") is None
