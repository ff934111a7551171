"""A process's start is found from its age, however the machine was booted and its clock was set."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest

from megatron_sov.obs import process_start

PROGRAM = """
import json, sys, time
first_line_s = time.time()
from megatron_sov.obs.process_start import process_started_s
time.sleep(0.3)
print(json.dumps([first_line_s, sorted(process_started_s() for _ in range(9))[4]]))
"""
TICK_S = 0.02
"""A clock tick, twice over."""


def test_a_process_started_between_its_call_and_its_first_line() -> None:
    called_s = time.time()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first_line_s, started_s = json.loads(done.stdout)
    assert called_s - TICK_S <= started_s <= first_line_s + TICK_S


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux's kernel tells of a process")
@pytest.mark.parametrize("booted_s", [1000.0, 1000.76, 1000.999])
@pytest.mark.parametrize("set_by_s", [0.0, -7200.0, 0.4])
def test_neither_the_fraction_of_the_boot_second_nor_setting_the_clock_counts(
        booted_s: float, set_by_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It started 12.34 s after the machine, and asks 20 s after it; somebody set the clock in between."""
    fields = ["4711", "(a ) name (R) 7)", "S", *["0"] * 18, "1234", "555"]
    monkeypatch.setattr(process_start, "open", lambda *a, **options: io.StringIO(" ".join(fields)),
                        raising=False)
    monkeypatch.setattr(process_start.os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr(process_start.time, "clock_gettime", {time.CLOCK_BOOTTIME: 20.0}.__getitem__)
    monkeypatch.setattr(process_start.time, "time", lambda: booted_s + 20 + set_by_s)
    assert process_start.process_started_s() == pytest.approx(booted_s + 12.34 + set_by_s, abs=1e-6)
