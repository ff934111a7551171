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
from megatron_sov.train.side_jobs import side_jobs, side_jobs as average_module
from megatron_sov.train.side_jobs.side_jobs import SideJobs, average_checkpoints


class Noted:
    """Records calls in place of exports or evaluations."""

    def __init__(self, name: str, asked: list[str], fails: set[str],
                 exported: Callable[[int], None] | None = None) -> None:
        self._name, self._asked, self._fails, self._exported = name, asked, fails, exported

    def _note(self, what: str) -> None:
        self._asked.append(f"{self._name} {what}")
        if f"{self._name} {what}" in self._fails:
            raise OSError("stale file handle")

    def offer(self, step: int, *checkpoint: Any) -> None:
        self._note(f"offer {step}")
        if self._exported is not None:
            self._exported(step)

    def __getattr__(self, name: str) -> Any:
        return lambda: self._note(name)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[SideJobs, list[str], set[str]]:
    """Side jobs with immediate exports, the recorded calls, and errors that the file system raises."""
    asked: list[str] = []
    fails: set[str] = set()
    monkeypatch.setattr(side_jobs, "ExportEvaluations",
                        lambda run, config, record: Noted("judge", asked, fails))
    monkeypatch.setattr(side_jobs, "CheckpointExports",
                        lambda run, config, record, exported: Noted("export", asked, fails, exported))
    return SideJobs(tmp_path, recipes.get("tiny-solar-open"), lambda event, **fields: None), asked, fails


def test_exports_are_evaluated_and_both_processes_end(jobs: Any) -> None:
    beside, asked, _ = jobs
    beside.offer(10, Path("step-10"), last=False)
    for action in (beside.poll, beside.wait, beside.close):
        action()
    assert asked == ["export offer 10", "judge offer 10", "export poll", "judge poll", "export wait",
                     "judge wait", "export close", "judge close"]


@pytest.mark.parametrize(("refused", "action"), [
    ("judge poll", SideJobs.poll),
    ("judge offer 10", lambda beside: beside.offer(10, Path("step-10"), last=False))])
def test_a_file_system_that_refuses_is_a_warning(refused: str, action: Callable[[SideJobs], None], jobs: Any,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    beside, asked, fails = jobs
    fails.add(refused)
    action(beside)
    assert asked[-1] == refused
    assert capsys.readouterr().err == (
        "warning: background evaluations cannot be followed (stale file handle)\n")


# The mean that a complete run leaves: made once, by the ordinary command, and a failure is an event.


TRAIN = TrainConfig(keep_checkpoints=3, average_last=2, average_weights="linear")


class Here:
    """`BackgroundProcess`, in this process."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.exit_code, self.took_s = main(command[command.index("megatron_sov") + 1:]), 0.1
        self.last_words = "it failed"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(average_module, "BackgroundProcess", Here)
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
    assert not events and not (run / "average").exists(), "by itself none is made"
    for _ in range(2):  # once, however often the run is asked for
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
