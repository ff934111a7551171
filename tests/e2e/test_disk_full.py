"""When the disk takes no more: one message, exit code 2, nothing half-written, and the run goes on later."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path
from typing import Any

from megatron_sov.obs.events import read_events

SETTINGS = ("train.steps=4", "train.checkpoint_every_steps=2")


def limited(argv: list[str], limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run a command whose files may not grow beyond a limit."""
    return subprocess.run(argv, capture_output=True, text=True, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                (limit_bytes, limit_bytes)))


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, pretrain: Any) -> None:
    run = tmp_path / "run"
    done = limited(pretrain(run, "--nproc", "2", settings=SETTINGS), 100_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\nerror: ") + done.stderr.startswith(
        "error: ") == 1, done.stderr
    assert "free some space" in done.stderr
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "events.jsonl"]
    assert list((run / "checkpoints").iterdir()) == []
    argv = pretrain(run, "--nproc", "2", "--resume", settings=SETTINGS)
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    steps = [e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step"]
    assert steps[-4:] == [1, 2, 3, 4] and 2 <= len(steps) - 4 <= 4, (
        "it may go on while the checkpoint is written")


def test_events_that_do_not_fit(tmp_path: Path, pretrain: Any) -> None:
    done = limited(pretrain(tmp_path / "run", settings=("train.steps=40",)), 6_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, (
        done.stderr)
    assert "events.jsonl: larger than the limit on file sizes" in done.stderr
