"""Profiles of the configured steps, and after a resume of the remaining ones."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sov.model.config import GpuConfig
from megatron_sov.train.side_jobs import side_jobs
from megatron_sov.train.side_jobs.side_jobs import PROFILE_FOLDER, StepProfiler

STEPS_2_AND_3 = GpuConfig(profile_first_step=2, profile_last_step=3)


def traced(run: Path, steps: range, is_main: bool = True) -> dict[str, list[str]]:
    """Run [step, step] matrix products in steps, and return trace -> shapes of its products."""
    profiling = StepProfiler(STEPS_2_AND_3, run, is_main)
    step = 0
    for step in steps:
        profiling.before_step(step)
        torch.ones(step, step) @ torch.ones(step, step)
        profiling.after_step(step)
    profiling.close(step)
    found = {}
    for file in sorted(run.glob(f"{PROFILE_FOLDER}/*")):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        found[file.name] = [str(e["args"]["Input Dims"][0]) for e in events if e.get("name") == "aten::mm"]
    return found


@pytest.mark.each(("steps", "expected"), [
    (range(1, 6), {"steps-2-3.json.gz": ["[2, 2]", "[3, 3]"]}),
    (range(3, 6), {"steps-3-3.json.gz": ["[3, 3]"]}),  # resumed after step 2
    (range(1, 3), {"steps-2-2.json.gz": ["[2, 2]"]}),  # ended before step 3
    (range(4, 6), {})])
def test_a_trace_has_the_steps_that_are_set(steps: range, expected: dict[str, list[str]],
                                            tmp_path: Path) -> None:
    assert traced(tmp_path, steps) == expected


def test_other_processes_write_no_profile(tmp_path: Path) -> None:
    assert traced(tmp_path, range(1, 6), is_main=False) == {}


@pytest.mark.each(("steps", "expected"), [
    (range(1, 6), ["2 on", "3 off"]), (range(1, 3), ["2 on", "2 off"]), (range(4, 6), [])])
def test_nvidia_profiler_starts_and_stops_on_every_process(steps: range, expected: list[str], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    told, step = list[str](), 0
    monkeypatch.setattr(side_jobs, "toggle_nsys_recording",
                        lambda *, on: told.append(f"{step} {'on' if on else 'off'}"))
    profiling = StepProfiler(replace(STEPS_2_AND_3, profiler="nsys"), tmp_path, is_main=False)
    for step in steps:
        profiling.before_step(step)
        profiling.after_step(step)
    profiling.close(step)
    assert told == expected
    assert not (tmp_path / PROFILE_FOLDER).exists()
