"""The plan that a run keeps: what its settings predict on the machine that it finds itself on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.mcore.parallel.device import on_gpu
from megatron_sov.model.config import RunConfig
from megatron_sov.plan.calibration.expected import Machine, expected
from megatron_sov.plan.footprint import kept
from megatron_sov.runs.folder import PLAN

CPU_INFO = Path("/proc/cpuinfo")


def keep_plan(config: RunConfig, num_ranks: int, run: Path, memory_before_bytes: int) -> int | None:
    """Keep a run's plan beside its events; returns its number, or None where it cannot be made: no run fails
    for its plan.

    Args:
        config: the run's settings.
        num_ranks: processes.
        run: its folder.
        memory_before_bytes: what this process had of the host's memory before its model was built.
    """
    try:
        machine = Machine(device_name(), on_gpu(), torch.get_num_threads(), memory_before_bytes)
        return kept.keep(run, expected(config, num_ranks, machine))
    except (UserError, ArithmeticError, AssertionError, LookupError, ValueError, TypeError) as e:
        warn(f"{run / PLAN}: no plan is kept ({e})")
        return None


def device_name() -> str:
    """Return what this machine's GPUs, or its processor, call themselves."""
    if on_gpu():
        return str(torch.cuda.get_device_name())
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
