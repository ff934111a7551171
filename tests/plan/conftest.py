"""Run folders as training leaves them, with step times chosen by the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import format_json
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.obs.events import EVENTS, EventLog

H100 = "NVIDIA H100 80GB HBM3"
CPU = "AMD EPYC"
WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Returns a function that writes a run: its name, settings, processes and steps' seconds."""
    def write(name: str, config: RunConfig, num_ranks: int, step_s: float, *, device: str = H100,
              num_steps: int = 20, on_gpu: bool = True, start: Mapping[str, Any] | None = None) -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(format_json(config.to_dict()))
        log = EventLog(run / EVENTS)
        told: dict[str, Any] = {"num_ranks": num_ranks, "layout": asdict(config.parallel) | {"dp": num_ranks},
                                "on_gpu": on_gpu, "machine": {"device": device, "threads": 2}}
        log.write("run_start", **(told | dict(start or {})))
        phase = config.data.phases[0]
        log.write("phase", step=0, name=phase.name, seq_len=phase.seq_len,
                  global_batch_size=phase.global_batch_size or config.train.global_batch_size)
        for step in range(1, num_steps + 1):
            stall = 30.0 if step in (1, 11) else 0.0  # it compiles, and once a disk is slow
            log.write("step", step=step, step_time_s=step_s + stall)
        log.close()
        return run

    return write
