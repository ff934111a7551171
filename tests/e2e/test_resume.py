"""A run that is stopped, killed and continued is the run that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.runs.lock import living_holder
from megatron_sov.runs.obs.events import final_steps, read_events

STEPS, MIDDLE = 30, 20
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every_steps=5", "train.keep_checkpoints=0",
            "train.eval_every_steps=10", "optim.warmup_steps=4", "optim.eps=1e-3")
EP2 = ("--nproc", "2", "--set", "parallel.ep=2")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return every step's numbers, without times."""
    timed = ("time_s", "step_time_s", "tokens_per_s", "tokens_per_s_per_process", "tflops_per_process",
             "peak_memory_bytes")
    return [{k: v for k, v in e.items() if k not in timed}
            for e in final_steps(list(read_events(run / "events.jsonl")))]


def last_step(run: Path) -> int:
    return max((e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step"), default=0)


def checkpoint_of(run: Path, step: int) -> Path:
    return next(p for p in (run / "checkpoints").glob("step-*") if int(p.name.removeprefix("step-")) == step)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    readers = {part: TensorReader(checkpoint_of(run, STEPS), part) for part in ("model", "optimizer")}
    return {f"{part}/{key}": reader.read(key) for part, reader in readers.items()
            for key in reader.keys()}  # noqa: SIM118


@pytest.mark.distributed
def test_stopped_killed_and_continued_equals_uninterrupted(
        tmp_path: Path, pretrain: Any, run_command: Any, start: Any, until: Any) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command(*pretrain(whole, *EP2, settings=SETTINGS)).returncode == 0

    run = start(pretrain(broken, *EP2, settings=SETTINGS))
    until(lambda: last_step(broken) >= 3, run)
    holder = json.loads((broken / "lock.json").read_text())["pid"]
    os.kill(holder, signal.SIGSTOP)  # the run lives and stands still while another one tries
    second = run_command(*pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    assert second.returncode == 2 and f"held by a living run (process {holder}" in second.stderr, (
        second.stderr)
    os.kill(psutil.Process(holder).ppid(), signal.SIGTERM)
    os.kill(holder, signal.SIGCONT)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 75 and "everything is saved; last checkpoint: step " in errors, errors
    stopped_at = last_step(broken)
    assert checkpoint_of(broken, stopped_at).is_dir() and not (broken / "lock.json").exists()
    assert stopped_at < STEPS and not (broken / "complete.json").exists()

    run = start(pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    until(lambda: last_step(broken) >= stopped_at + 8, run)
    rank_zero = json.loads((broken / "lock.json").read_text())["pid"]
    # the launcher; here its ranks end with its session, tests/engine/parallel/test_launcher.py has orphans
    os.kill(psutil.Process(rank_zero).ppid(), signal.SIGKILL)
    run.wait(timeout=600)
    assert (broken / "lock.json").exists()
    while living_holder(broken) is not None:  # a rank that waits for a processor has not heard of it yet
        time.sleep(0.05)

    # nothing is typed again: settings, data and the number of processes are in the folder
    done = run_command("resume", str(broken))
    assert done.returncode == 0, done.stderr
    reasons = [e["event"] for e in read_events(broken / "events.jsonl")
               if e["event"] in ("stop", "resume", "run_end")]
    assert reasons == ["stop", "resume", "resume", "run_end"]
    assert [s["step"] for s in steps_of(broken)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps_of(broken), steps_of(whole), strict=True):
        assert ours == theirs
    ours, theirs = tensors_of(broken), tensors_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    _continues_at_another_size(whole, tmp_path / "other", pretrain, run_command)


def _continues_at_another_size(whole: Path, other: Path, pretrain: Any, run_command: Any) -> None:
    """From the middle of a run on two processes, one process goes on alike to the order of float sums."""
    middle = checkpoint_of(whole, MIDDLE)
    shutil.copytree(middle, other / "checkpoints" / middle.name)
    shutil.copy(whole / "config.json", other)
    done = run_command(*pretrain(other, "--resume", settings=SETTINGS))
    assert done.returncode == 0, done.stderr
    ours = {s["step"]: s for s in steps_of(other)}
    assert sorted(ours) == list(range(MIDDLE + 1, STEPS + 1))
    for step in steps_of(whole)[MIDDLE:]:
        assert ours[step["step"]]["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert ours[step["step"]]["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
        assert ours[step["step"]]["tokens"] == step["tokens"]
