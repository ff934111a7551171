"""Processor, cores and Python of a benchmark's machine, for the first line of its output."""

from __future__ import annotations

import os
import platform


def read_processor_name() -> str:
    """Return the processor's model, or its architecture if Linux names no model."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        return next(models, platform.machine())


def describe_machine() -> str:
    """Return processor, cores and Python."""
    return (f"{read_processor_name()}, {len(os.sched_getaffinity(0))} cores, "
            f"Python {platform.python_version()}")
