"""Exports and evaluations together: exports are evaluated, and failures never end a run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert, recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.cli import main
from megatron_sov.model.config import TrainConfig
from megatron_sov.train.side_jobs import side_jobs
from megatron_sov.train.side_jobs.side_jobs import SideJobs, average_checkpoints


class CallRecorder:
    """Double of exports or evaluations: records calls as "NAME CALL", and raises OSError for
    `failing_calls`."""

    def __init__(self, name: str, calls: list[str], failing_calls: set[str],
                 exported: Callable[[int], None] | None = None) -> None:
        self._name, self._calls, self._failing_calls, self._exported = name, calls, failing_calls, exported

    def _record(self, call: str) -> None:
        self._calls.append(f"{self._name} {call}")
        if f"{self._name} {call}" in self._failing_calls:
            raise OSError("stale file handle")

    def offer(self, step: int, *checkpoint: Any) -> None:
        self._record(f"offer {step}")
        if self._exported is not None:
            self._exported(step)

    def __getattr__(self, name: str) -> Any:
        return lambda: self._record(name)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[SideJobs, list[str], set[str]]:
    """Return side jobs with immediate exports, the recorded calls, and the set of calls that fail."""
    calls: list[str] = []
    failing_calls: set[str] = set()
    monkeypatch.setattr(side_jobs, "ExportEvaluations",
                        lambda run, config, record: CallRecorder("judge", calls, failing_calls))
    monkeypatch.setattr(side_jobs, "CheckpointExports",
                        lambda run, config, record, exported: CallRecorder("export", calls, failing_calls,
                                                                           exported))
    jobs_of_run = SideJobs(tmp_path, recipes.get("tiny-solar-open"), lambda event, **fields: None)
    return jobs_of_run, calls, failing_calls


def test_exports_are_evaluated_and_both_processes_end(jobs: Any) -> None:
    side_jobs_of_run, calls, _ = jobs
    side_jobs_of_run.offer(10, Path("step-10"), last=False)
    for action in (side_jobs_of_run.poll, side_jobs_of_run.wait, side_jobs_of_run.close):
        action()
    assert calls == ["export offer 10", "judge offer 10", "export poll", "judge poll", "export wait",
                     "judge wait", "export close", "judge close"]


@pytest.mark.parametrize(("failing_call", "action"), [
    ("judge poll", SideJobs.poll),
    ("judge offer 10", lambda side_jobs_of_run: side_jobs_of_run.offer(10, Path("step-10"), last=False))])
def test_a_file_system_that_refuses_is_a_warning(failing_call: str, action: Callable[[SideJobs], None],
                                                 jobs: Any,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    side_jobs_of_run, calls, failing_calls = jobs
    failing_calls.add(failing_call)
    action(side_jobs_of_run)
    assert calls[-1] == failing_call
    assert capsys.readouterr().err == (
        "warning: background evaluations cannot be followed (stale file handle)\n")


# The mean of the last checkpoints: computed once, after the last step, by `megatron-sov average`.


TRAIN = TrainConfig(keep_checkpoints=3, average_last=2, average_weights="linear")


class ForegroundProcess:
    """Double of `BackgroundProcess` that runs the command in this process."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.exit_code, self.took_s = main(command[command.index("megatron_sov") + 1:]), 0.1
        self.last_words = "it failed"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(side_jobs, "BackgroundProcess", ForegroundProcess)
    return []


def test_a_complete_run_leaves_the_mean_of_its_newest_checkpoints(tmp_path: Path, imported: dict[str, Path],
                                                                  events: list[dict[str, Any]],
                                                                  capsys: Any) -> None:
    def record(name: str, **fields: Any) -> None:
        events.append({"event": name, **fields})

    run = tmp_path / "run"
    for step in (1, 2, 3):
        shutil.copytree(imported["solar_open"], run / f"checkpoints/step-{step}")
    average_checkpoints(run, TrainConfig(), record)
    assert not events and not (run / "average").exists(), "average_last = 0 computes no mean"
    for _ in range(2):  # the second call finds the mean of the first
        average_checkpoints(run, TRAIN, record)
    assert [(e["event"], e["step"], e["path"], e["weights"]) for e in events] == [
        ("average", 3, "average", "linear")]
    merged = read_manifest(run / "average", "checkpoint").content["merged"]
    assert [(Path(m["path"]).name, m["weight"]) for m in merged] == [("step-2", 1.0), ("step-3", 2.0)]
    convert.to_hf(run / "average", tmp_path / "average")
    convert.to_hf(imported["solar_open"], tmp_path / "one")
    for name, tensor in load_file(tmp_path / "average/model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(tmp_path / "one/model.safetensors")[name])

    shutil.rmtree(run / "checkpoints/step-1")
    shutil.rmtree(run / "checkpoints/step-2")
    shutil.rmtree(run / "average")
    average_checkpoints(run, TRAIN, record)
    assert events[-2] == {"event": "average", "step": 3, "error": "it failed"}
    assert "checkpoint averaging failed: it failed" in capsys.readouterr().err
