"""The checkpoint to resume from: the latest valid one. Damaged checkpoints are set aside with a warning."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.base.artifacts import MANIFEST, create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.model.config import GuardConfig, apply_settings
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.train import recovery
from megatron_sov.train.checkpointer import Checkpointer, TrainState, find_sound_checkpoint
from megatron_sov.train.data.ledger import Ledger, LedgerEntry
from megatron_sov.train.guards.step_guard import StepGuard, StepRejection
from tests.tiny import tiny_model


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints after 2, 4 and 6 steps."""
    folder = RunFolder(tmp_path / "run")
    for step in (2, 4, 6):
        with create_artifact(folder.checkpoint(step), "checkpoint") as artifact:
            (artifact.path / "state.json").write_text(f"{step} steps")
    return folder


def get_resumable_name(run: RunFolder, place: Any, **options: int) -> str | None:
    """Return the name of the checkpoint from which a run resumes, or None."""
    checkpoint = find_sound_checkpoint(run, place, **options)
    return checkpoint.name if checkpoint is not None else None


def list_checkpoints(run: RunFolder) -> list[str]:
    return sorted(p.name for p in run.checkpoints.iterdir())


def test_newest_checkpoint_up_to_a_step_is_loaded_without_changes(run: RunFolder, alone: Any) -> None:
    assert get_resumable_name(run, alone) == "step-6"
    assert [get_resumable_name(run, alone, last_step=step) for step in (6, 5, 2, 1)] == [
        "step-6", "step-4", "step-2", None]
    assert list_checkpoints(run) == ["step-2", "step-4", "step-6"] and not (run.path / EVENTS).exists()


def test_damaged_checkpoints_are_set_aside_with_a_warning(run: RunFolder, alone: Any,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoint(6) / "state.json").write_text("6 stepS")
    (run.checkpoint(4) / MANIFEST).unlink()
    assert get_resumable_name(run, alone) == "step-2"
    assert list_checkpoints(run) == ["damaged-step-4", "damaged-step-6", "step-2"]
    assert (run.checkpoints / "damaged-step-6/state.json").read_text() == "6 stepS", "it may be looked into"
    reasons = [f"{run.checkpoint(6)}/state.json: its content differs from the hash in the manifest",
               f"{run.checkpoint(4)}/{MANIFEST}: is missing"]
    texts = [f"{reason}; step-{step} is renamed to damaged-step-{step}, and the run goes on from the "
             "checkpoint before it" for reason, step in zip(reasons, (6, 4), strict=True)]
    assert capsys.readouterr().err.splitlines() == [f"warning: {text}" for text in texts]
    events = [{k: v for k, v in event.items() if k != "time_s"} for event in read_events(run.path / EVENTS)]
    assert [event for event in events if event["event"] == "warning"] == [
        {"event": "warning", "step": step, "text": text} for step, text in zip((6, 4), texts, strict=True)]
    assert [event for event in events if event["event"] == "damaged_checkpoint"] == [
        {"event": "damaged_checkpoint", "path": f"checkpoints/step-{step}", "reason": reason,
         "renamed_to": f"checkpoints/damaged-step-{step}"}
        for step, reason in zip((6, 4), reasons, strict=True)]
    assert get_resumable_name(run, alone) == "step-2"
    assert len(list(read_events(run.path / EVENTS))) == 4, "a second search reports nothing again"


def test_checkpoints_after_the_requested_step_are_not_checked(run: RunFolder, alone: Any) -> None:
    (run.checkpoint(6) / "state.json").unlink()
    assert get_resumable_name(run, alone, last_step=4) == "step-4"
    assert list_checkpoints(run) == ["step-2", "step-4", "step-6"]


def test_no_checkpoint_is_loaded_if_all_are_damaged(run: RunFolder, alone: Any) -> None:
    for step in (2, 4, 6):
        (run.checkpoint(step) / MANIFEST).write_text("{")
    assert get_resumable_name(run, alone) is None
    assert list_checkpoints(run) == [f"damaged-step-{step}" for step in (2, 4, 6)]


# `Checkpointer.sync` at the end of a step: all ranks learn of a stop signal of one rank, and a checkpoint is
# completed when all ranks have written it.


def save_and_restore(run: str) -> dict[str, Any]:
    """Inside ranks: save a checkpoint during empty steps, then load it. Only rank 1 receives a stop signal.

    Returns:
        "reports": whether `sync` reports a stop request during the save, the completed checkpoints, and
        whether it reports one after the signal; "state": the restored step, tokens and seconds;
        "without_order" and "with_order": the values of data order and guard after loading without and with
        the data order; "made_copies": whether an asynchronous and a synchronous save copied the tensors.
    """
    config, model = tiny_model("tiny-solar-open", "model.num_layers=1")
    folder, optimizer = RunFolder(Path(run)), Optimizer(model, config.optim)
    stateful = {name: Memory(name) for name in ("order", "guard")}
    saved: list[Any] = []
    checkpointer = Checkpointer(config, folder, [], model, optimizer, stateful["order"],
                                {"guard": stateful["guard"]}, saved.append)
    stop: Any = SimpleNamespace(reason=None)
    checkpointer.save(TrainState(3, 77, 0.5))
    steps = 0
    while not saved and steps < 10_000:
        stop_requested = checkpointer.sync(stop)
        steps += 1
        time.sleep(0.01)
    reports = [stop_requested, [s.path.name for s in saved]]
    stop.reason = "SIGTERM" if torch.distributed.get_rank() == 1 else None
    reports.append(checkpointer.sync(stop))
    for memory in stateful.values():
        memory.value = "changed"
    state = checkpointer.load(folder.checkpoint(3), load_data_order=False)
    values_without_data_order = [memory.value for memory in stateful.values()]
    checkpointer.load(folder.checkpoint(3))
    synchronous = Checkpointer(apply_settings(config, ["train.async_save=false"]), folder, [], model,
                               optimizer, stateful["order"], {"guard": stateful["guard"]}, saved.append)
    synchronous.save(TrainState(4, 88, 0.5))
    synchronous.finish()
    made_copies = [bool(c._saver._snapshot._memory) for c in (checkpointer, synchronous)]
    return {"reports": reports, "state": [state.step, state.tokens, state.wall_s],
            "without_order": values_without_data_order, "made_copies": made_copies,
            "with_order": [memory.value for memory in stateful.values()]}


class Memory:
    """A stateful object whose state is one word."""

    def __init__(self, value: str) -> None:
        self.value = value

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def restore(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.distributed
def test_a_step_merges_reports_of_all_processes(ranks: Any, job: Any, tmp_path: Path) -> None:
    (results,) = ranks(job(__file__, "save_and_restore", 2, {"run": str(tmp_path / "run")}))
    assert any(result["made_copies"][0] for result in results)
    assert not any(result["made_copies"][1] for result in results), (
        "tensors cannot change during a synchronous save: no copy is needed")
    for result in results:
        assert result["reports"] == [False, ["step-3"], True], "`sync` completes the checkpoint"
        assert result["state"] == [3, 77, 0.5]
        assert result["without_order"] == ["changed", "guard"]
        assert result["with_order"] == ["order", "guard"]


# Rollbacks of weights: to the last good checkpoint, never twice to the same; an error if no checkpoint is
# left.


class TrainerDouble:
    """Double of a trainer with checkpoints at some steps, after `num_rejections` rejected steps in a row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoints: list[int], step: int,
                 num_rejections: int, rollbacks: list[dict[str, int]]) -> None:
        self.checkpoints = checkpoints
        self.step = step
        self.guard = StepGuard(GuardConfig(), is_main=True)
        self.guard.rejection = StepRejection("the loss is nan", 0.0, 0.0, finite=False, weights_suspect=True)
        self.guard.consecutive_rejections, self.guard.rollbacks = num_rejections, rollbacks
        self.guards = SimpleNamespace(step_guard=self.guard)
        self.checkpointer = SimpleNamespace(finish=lambda: None)
        self.folder = SimpleNamespace(checkpoints=Path("checkpoints"))
        self.world = SimpleNamespace(is_main=True)
        self.config = SimpleNamespace(optim=SimpleNamespace(lr=0.1))
        self.batches = SimpleNamespace(ledger=Ledger([LedgerEntry(0, "a", 32, 8, {"x": 1.0})]))
        self.written_events: list[dict[str, Any]] = []
        self.events = SimpleNamespace(
            write=lambda event, **fields: self.written_events.append({"event": event, **fields}))
        monkeypatch.setattr(recovery, "find_sound_checkpoint", self.find_newest)
        monkeypatch.setattr(recovery, "run_on_main", lambda place, action: action())
        monkeypatch.setattr(recovery.checkpoints, "delete_checkpoints_after", self.delete_after)

    def find_newest(self, folder: Any, place: Any, not_after: int) -> Path | None:
        steps = [step for step in self.checkpoints if step <= not_after]
        return Path(f"step-{max(steps)}") if steps else None

    def delete_after(self, folder: Path, step: int) -> None:
        self.checkpoints = [s for s in self.checkpoints if s <= step]

    def restore_weights(self, path: Path) -> int:
        self.guard.rollbacks = []  # loading a checkpoint restores its (empty) guard state
        return int(path.name.removeprefix("step-"))


def test_weights_go_back_and_the_data_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TrainerDouble(monkeypatch, [10, 20, 30], step=33, num_rejections=4, rollbacks=[])
    recovery.rollback_weights(trainer)  # type: ignore[arg-type]
    assert trainer.checkpoints == [10, 20], "checkpoint 30 was saved after a rejected step"
    assert trainer.guard.rollbacks == [{"at": 33, "to": 20}] and trainer.guard.consecutive_rejections == 0
    assert [(e.first_step, e.skip) for e in trainer.batches.ledger.entries] == [
        (0, False), (20, True), (33, False)]
    text = ("steps 30 to 33 were rejected in a row (the loss is nan): weights and optimizer are restored "
            "from step 20, and the samples of steps 21 to 33 are skipped")
    assert trainer.written_events[0] == {
        "event": "rollback", "step": 33, "back_to": 20, "refused": 4, "text": text}


@pytest.mark.each(("checkpoints", "step", "rollbacks", "back_to"), [
    ([5, 10, 20, 33], 37, [{"at": 33, "to": 20}], 10),
    ([5, 10, 37], 41, [{"at": 33, "to": 20}, {"at": 37, "to": 10}], 5),
    # after accepted steps, the newest checkpoint is good again
    ([10, 20, 33, 40], 47, [{"at": 33, "to": 20}], 40)])
def test_a_second_rollback_goes_further_back(checkpoints: list[int], step: int,
                                             rollbacks: list[dict[str, int]], back_to: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TrainerDouble(monkeypatch, checkpoints, step, 4, rollbacks)
    recovery.rollback_weights(trainer)  # type: ignore[arg-type]
    assert trainer.guard.rollbacks == [*rollbacks, {"at": step, "to": back_to}]


@pytest.mark.parametrize(("checkpoints", "rollbacks", "message"), [
    ([], [], "no earlier checkpoint exists"),
    ([20, 33], [{"at": 33, "to": 20}], "no checkpoint exists before step 20, which was tried")])
def test_the_run_ends_if_no_rollback_is_possible(monkeypatch: pytest.MonkeyPatch, checkpoints: list[int],
                                                 rollbacks: list[dict[str, int]], message: str) -> None:
    trainer = TrainerDouble(monkeypatch, checkpoints, step=37, num_rejections=4, rollbacks=rollbacks)
    with pytest.raises(UserError) as e:
        recovery.rollback_weights(trainer)  # type: ignore[arg-type]
    assert str(e.value).startswith("steps 34 to 37 were rejected in a row (the last: the loss is nan)")
    assert message in str(e.value)
    assert trainer.checkpoints == checkpoints and trainer.written_events == [], "nothing was changed"
