"""What `gpu.*` does and refuses where a user reaches it: at the command line, on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.runs.obs.events import read_events


@pytest.mark.distributed
def test_a_run_measures_itself_traces_steps_and_is_refused_what_cannot_be(
        tmp_path: Path, pretrain: Any, run_command: Any) -> None:
    run, refused = tmp_path / "run", tmp_path / "refused"
    settings = ("train.steps=3", "gpu.gc_every_steps=2", "gpu.peak_tflops=0.5", "gpu.profile_first_step=2",
                "gpu.profile_last_step=3", "train.recompute=selective", 'gpu.recompute_modules=["moe"]')
    done = run_command(*pretrain(run, settings=settings))
    assert done.returncode == 0, done.stderr
    events = list(read_events(run / "events.jsonl"))
    (start,) = (e for e in events if e["event"] == "run_start")
    assert start["gpu"]["attention"] == "local" and not start["gpu"]["swiglu_fusion"]
    steps = [e for e in events if e["event"] == "step"]
    assert all(e["mfu"] == e["tflops_per_process"] / 0.5 > 0 and e["peak_memory_bytes"] > 1e7 for e in steps)
    assert [p.name for p in (run / "profile").iterdir()] == ["steps-2-3.json.gz"]

    done = run_command(*pretrain(refused, settings=("gpu.swiglu_fusion=on", "gpu.attention=fused")))
    assert done.returncode == 2 and "Traceback" not in done.stderr and not refused.exists()
    assert done.stderr.count("needs Transformer Engine on a GPU, and a bf16 model") == 2
