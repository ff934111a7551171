"""Exports next to training equal `to_hf`, even if the checkpoint is deleted meanwhile; a failure is an
event."""

import contextlib
import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import convert
from megatron_sov.base.artifacts import sha256_file
from megatron_sov.cli import main
from megatron_sov.model.config import TrainConfig
from megatron_sov.model.families import supported as models
from megatron_sov.runs.folder import EXPORTS
from megatron_sov.train.side_jobs import side_jobs as exports_module
from megatron_sov.train.side_jobs.side_jobs import CheckpointExports

TRAIN = TrainConfig(checkpoint_every_steps=10, export_every_checkpoints=2)


class ForkedCommand:
    """A `megatron-sov` command in a fork that has imported everything, with the interface of
    `BackgroundProcess`."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log, self.took_s = log, 0.1
        self._exit_code: int | None = None
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    torch.set_num_threads(1)  # the parent's threads do not exist here
                    code = main(command[command.index("megatron_sov") + 1:])
            finally:
                os._exit(code)

    @property
    def exit_code(self) -> int | None:
        if self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid, self._exit_code = 0, os.waitstatus_to_exitcode(status)
        return self._exit_code

    @property
    def last_words(self) -> str:
        return self._log.read_text().strip().splitlines()[-1].removeprefix("error: ")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture
def run_commands_in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports run in forks."""
    monkeypatch.setattr(exports_module, "BackgroundProcess", ForkedCommand)


class Run:
    """A run's folder with checkpoints, and the events that exports wrote."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        self.path, self._checkpoint = path, checkpoint
        self.events: list[dict[str, Any]] = []

    def start_exports(self, **changes: int) -> CheckpointExports:
        return CheckpointExports(self.path, dataclasses.replace(TRAIN, **changes),
                                 lambda name, **fields: self.events.append({"event": name, **fields}))

    def copy_checkpoint(self, step: int) -> Path:
        return Path(shutil.copytree(self._checkpoint, self.path / f"checkpoints/step-{step}"))

    def list_exports(self) -> list[str]:
        return sorted(p.name for p in (self.path / EXPORTS).iterdir())


@pytest.fixture
def run(tmp_path: Path, imported: dict[str, Path]) -> Run:
    return Run(tmp_path / "run", imported["solar_open"])


def test_export_process_gets_the_family_of_the_command_line(run: Run, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(exports_module, "BackgroundProcess", lambda argv, log: commands.append(argv))
    monkeypatch.setattr(models.FAMILY_PLUGINS, "_known", {})
    run.start_exports().offer(20, run.copy_checkpoint(20), False)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom megatron_sov.model.families.supported import QWEN3\n"
        "MINE = replace(QWEN3, name='mine')\n")
    models.FAMILY_PLUGINS.load(f"{tmp_path}/mine.py:MINE")
    run.start_exports().offer(40, run.copy_checkpoint(40), False)
    assert "--plugin" not in commands[0]
    assert commands[1][-2:] == ["--plugin", f"{tmp_path}/mine.py:MINE"]


@pytest.mark.usefixtures("run_commands_in_forks")
def test_every_second_and_the_last_checkpoint_are_exported_despite_pruning(run: Run, capsys) -> None:
    exports = run.start_exports()
    running_and_waiting = []
    for step, last in ((10, False), (15, False), (20, False), (25, True)):
        path = run.copy_checkpoint(step)
        exports.offer(step, path, last)
        shutil.rmtree(path)
        running_and_waiting.append((exports._running.step if exports._running else None,
                                    list(exports._waiting)))
    assert running_and_waiting == [(None, []), (None, []), (20, []), (20, [25])]
    exports.wait()
    assert run.list_exports() == ["step-20", "step-25"]
    assert [(e["event"], e["step"], e["path"]) for e in run.events] == [
        ("export", s, f"exports/step-{s}") for s in (20, 25)]
    convert.to_hf(run.copy_checkpoint(30), run.path / "by-hand")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256_file(run.path / EXPORTS / "step-20" / name) == sha256_file(run.path / "by-hand" / name)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("run_commands_in_forks")
def test_a_failed_export_is_an_event_and_the_next_export_runs(run: Run, capsys) -> None:
    exports, damaged = run.start_exports(), run.copy_checkpoint(20)
    (file,) = (damaged / "model").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    exports.offer(20, damaged, last=False)
    exports.offer(40, run.copy_checkpoint(40), last=False)
    exports.offer(60, run.copy_checkpoint(60), last=False)
    exports.wait()
    by_step = {e["step"]: e for e in run.events if e["event"] == "export"}
    assert "bytes, the manifest says" in by_step[20]["error"]
    assert "a newer checkpoint was ready" in by_step[40]["error"]
    assert "path" in by_step[60] and run.list_exports() == ["step-60"]
    assert sorted(e["step"] for e in run.events if e["event"] == "warning") == [20, 40]
    assert "warning: export of step 20 failed" in capsys.readouterr().err


@pytest.mark.usefixtures("run_commands_in_forks")
def test_a_stopped_run_leaves_its_export_to_the_next_start(run: Run) -> None:
    exports = run.start_exports()
    exports.offer(20, run.copy_checkpoint(20), last=False)
    exports.close()
    (unfinished := run.path / EXPORTS / ".step-40.source/model").mkdir(parents=True)
    assert not (run.path / EXPORTS / "step-20").exists()
    run.start_exports().wait()
    assert run.list_exports() == ["step-20"] and not unfinished.exists()


@pytest.mark.usefixtures("run_commands_in_forks")
def test_checkpoints_that_cannot_be_linked_do_not_end_the_run(run: Run) -> None:
    run.path.mkdir()
    (run.path / EXPORTS).write_text("a file where the folder should be")
    exports = run.start_exports(export_every_checkpoints=1)
    exports.offer(10, run.copy_checkpoint(10), last=False)
    assert "cannot be linked" in run.events[0]["error"]
