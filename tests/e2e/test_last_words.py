"""A run that ends by an error says why in its own folder, where someone looks in the morning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.runs.obs.events import EVENTS, read_events

SETTINGS = ("train.steps=6", "train.eval_every_steps=0")


@pytest.mark.distributed
def test_why_a_run_ended_stands_in_its_status(pretrain: Any, run_command: Any, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    refused, crashed, learned = tmp_path / "refused", tmp_path / "crashed", tmp_path / "learned"
    arguments = {refused: ("--inject", "nan@step=1,nan@step=2", "--set", "guards.rollback_after_skips=2"),
                 learned: ("--inject", "nan@step=3", "--set", "guards.skip=false", "--set",
                           "train.checkpoint_every_steps=2"),
                 crashed: ("--inject", "raise@step=2", "--set", "train.max_restarts=0")}
    ended = {run: run_command(*pretrain(run, *words, settings=SETTINGS)) for run, words in arguments.items()}
    assert [ended[run].returncode for run in (refused, crashed, learned)] == [2, 1, 2]
    sentences = {refused: "steps 1 to 2 were refused in a row (the last one: "
                          "the loss is nan), and of checkpoints there is none",
                 learned: "step 3: the loss is nan and the gradient norm nan; "
                          "lower optim.lr = 0.004 and start a new --run --from "
                          f"{learned}/checkpoints/step-2, the last checkpoint, or switch on guards.skip",
                 crashed: "rank 0 ended with exit code 1, and train.max_restarts = 0 lets no process start "
                          "again; find the cause"}
    for run, sentence in sentences.items():
        assert f"error: {sentence}" in ended[run].stderr
        assert main(["status", str(run)]) == 0
        status = capsys.readouterr().out
        assert f"  state       ended ({sentence}" in status
        assert ("  incidents   2 x step not learned (megatron-sov logs" in status) == (run == refused)
        assert main(["logs", str(run)]) == 0
        assert f"ended by an error: {sentence}" in capsys.readouterr().out


FAILING = """
import os, time
from megatron_sov.checkpoint.host_snapshot import Snapshot
from megatron_sov.train.objectives.data_objective import LanguageModelling

write = Snapshot.write


def slowly(self, folder, rank):
    time.sleep(1)
    write(self, folder, rank)


class Failing(LanguageModelling):
    def __init__(self, context):
        super().__init__(context)
        Snapshot.write = slowly

    def collect(self, policy, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise ValueError("a defect of one process")
        return super().collect(policy, step)
"""


@pytest.mark.distributed
def test_a_checkpoint_that_is_being_written_when_an_error_comes_is_there_afterwards(
        pretrain: Any, run_command: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    settings = (*SETTINGS, f"objective.name={tmp_path}/mine.py:Failing", "train.checkpoint_every_steps=2",
                "train.max_restarts=0")
    done = run_command(*pretrain(tmp_path / "run", "--nproc", "2", settings=settings))
    assert (done.returncode, "ValueError: a defect of one process" in done.stderr) == (1, True), done.stderr
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    saved = [e for e in read_events(tmp_path / "run" / EVENTS) if e["event"] == "checkpoint"]
    assert [(e["step"], e["save_s"] > 1) for e in saved] == [(2, True)]
