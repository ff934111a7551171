"""Processor, cores and Python of a benchmark's machine, for the first line of its output."""

import os
import platform

from megatron_sov.runs.launch_environment import read_processor_name


def describe_machine() -> str:
    """Return processor, cores and Python."""
    return (f"{read_processor_name()}, {len(os.sched_getaffinity(0))} cores, "
            f"Python {platform.python_version()}")
