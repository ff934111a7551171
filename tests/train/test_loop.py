"""The order of a run's actions, with a trainer that only writes them down."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.train.loop import train  # noqa: E402


class Recorded:
    """Stands for a trainer: notes what the loop asks for."""

    def __init__(self, num_steps: int, done: int = 0, skipped: tuple[int, ...] = (), **settings: int) -> None:
        self.skipped = skipped
        self.num_steps, self.state = num_steps, SimpleNamespace(step=done)
        self.config = SimpleNamespace(train=SimpleNamespace(**{"eval_every_steps": 0, "checkpoint_every_steps": 100, **settings}))
        self.actions: list[str] = []
        self.gate: Any = None
        self.guard = SimpleNamespace(wants_rollback=False)
        self.watched: int | None = None
        self.watchdog = SimpleNamespace(begin=lambda step: setattr(self, "watched", step),
                                        end=lambda: setattr(self, "watched", None))
        self.events = SimpleNamespace(write=lambda event, **fields: self.actions.append(f"{event} {fields['step']}"))

    @property
    def finished(self) -> bool:
        return self.state.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    def update(self) -> Any:
        self.state.step += 1
        assert self.watched == self.state.step, "a hang in a step is noticed"
        return None if self.state.step in self.skipped else SimpleNamespace(loss=1.0)

    def log(self, result: Any) -> None:
        self.actions.append(f"log {self.state.step}")

    def wall_s(self) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Any:
        if name == "saver":
            return SimpleNamespace(finish=lambda: self.actions.append(f"saved {self.state.step}"))
        if name not in ("announce", "log_expert_load", "evaluate", "save"):
            raise AttributeError(name)
        assert self.watched is None, f"{name} may take longer than a step"
        return lambda: self.actions.append(f"{name} {self.state.step}")


class Stop:
    """A flag that is raised after some step."""

    reason = "SIGTERM"

    def __init__(self, trainer: Recorded, after: int = 10 ** 9) -> None:
        self.trainer, self.after = trainer, after

    def agreed(self, saver: Any) -> bool:
        return self.trainer.state.step >= self.after


def actions(trainer: Recorded, stop_after: int = 10 ** 9) -> tuple[bool, list[str]]:
    complete = train(trainer, Stop(trainer, stop_after))  # type: ignore[arg-type]
    return complete, [a for a in trainer.actions if not a.startswith(("log", "announce"))]


def test_evaluations_and_checkpoints_come_when_they_are_due_and_at_the_end() -> None:
    found = actions(Recorded(7, eval_every_steps=3, checkpoint_every_steps=2))
    assert found == (True, ["save 2", "evaluate 3", "save 4", "evaluate 6", "save 6", "evaluate 7", "save 7", "saved 7",
                            "run_end 7"])


def test_without_a_rhythm_there_is_one_of_each_at_the_end() -> None:
    assert actions(Recorded(3)) == (True, ["evaluate 3", "save 3", "saved 3", "run_end 3"])


@pytest.mark.parametrize("step", [1, 2])
def test_a_stop_saves_once_and_leaves(step: int) -> None:
    assert actions(Recorded(5, checkpoint_every_steps=2), step) == (False, [f"save {step}", f"saved {step}", f"stop {step}"])


def test_a_stop_at_the_last_step_completes_the_run() -> None:
    assert actions(Recorded(3), 3) == (True, ["evaluate 3", "save 3", "saved 3", "run_end 3"])


def test_a_run_that_was_killed_behind_its_last_step_only_ends() -> None:
    assert actions(Recorded(3, done=3)) == (True, ["saved 3", "run_end 3"])


def test_a_gate_that_passes_ends_the_run_with_all_that_the_last_step_gets() -> None:
    trainer = Recorded(9, eval_every_steps=2)
    trainer.gate = SimpleNamespace(passed=False)
    trainer.gate.check = lambda trainer: setattr(trainer.gate, "passed", trainer.state.step == 5)
    assert actions(trainer) == (True, ["evaluate 2", "evaluate 4", "evaluate 5", "save 5", "saved 5", "run_end 5"])
    assert actions(trainer)[1][-2:] == ["saved 5", "run_end 5"], "entered again it only ends"


def test_a_skipped_step_keeps_the_rhythm_and_has_nothing_to_log() -> None:
    trainer = Recorded(4, skipped=(2, 4), eval_every_steps=2, checkpoint_every_steps=2)
    assert actions(trainer) == (True, ["evaluate 2", "save 2", "evaluate 4", "save 4", "saved 4", "run_end 4"])
    assert [a for a in trainer.actions if a.startswith("log")] == ["log 1", "log 3"]


def test_weights_that_were_taken_back_are_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Recorded(5, skipped=(2, 3), checkpoint_every_steps=4)
    before = trainer.update

    def update() -> Any:
        result = before()
        trainer.guard.wants_rollback = trainer.state.step == 3
        return result

    trainer.update = update  # type: ignore[method-assign]
    monkeypatch.setattr("megatron_sov.train.loop.rollback", lambda t: t.actions.append(f"roll back {t.state.step}"))
    assert actions(trainer) == (True, ["roll back 3", "save 3", "save 4", "evaluate 5", "save 5", "saved 5", "run_end 5"])
