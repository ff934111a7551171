"""Where weights are taken back to: the last good checkpoint, never the same one twice,
and a clear end where none is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.config import GuardConfig
from megatron_sov.data.ledger import Ledger, LedgerEntry
from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.train import rollback  # noqa: E402
from megatron_sov.train.guards.step_guard import Refusal, StepGuard  # noqa: E402


class Run:
    """Stands for a trainer with checkpoints at some steps; notes what happens to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoints: list[int], now: int, refused: int,
                 rollbacks: list[dict[str, int]]) -> None:
        self.checkpoints = checkpoints
        self.step = now
        self.guard = StepGuard(GuardConfig(), is_main=True)
        self.guard.refusal = Refusal("the loss is nan", 0.0, 0.0, finite=False, weights_suspect=True)
        self.guard.in_a_row, self.guard.rollbacks = refused, rollbacks
        self.guards = SimpleNamespace(step_guard=self.guard)
        self.checkpointer = SimpleNamespace(finish=lambda: None)
        self.folder = SimpleNamespace(checkpoints=Path("checkpoints"))
        self.world = SimpleNamespace(is_main=True)
        self.config = SimpleNamespace(optim=SimpleNamespace(lr=0.1))
        self.batches = SimpleNamespace(ledger=Ledger([LedgerEntry(0, "a", 32, 8, {"x": 1.0})]))
        self.told: list[dict[str, Any]] = []
        self.events = SimpleNamespace(
            write=lambda event, **fields: self.told.append({"event": event, **fields}))
        monkeypatch.setattr(rollback, "newest_sound", self.newest_sound)
        monkeypatch.setattr(rollback, "on_main", lambda place, action: action())
        monkeypatch.setattr(rollback.checkpoints, "drop_after", self.drop_after)

    def newest_sound(self, folder: Any, place: Any, not_after: int) -> Path | None:
        found = [step for step in self.checkpoints if step <= not_after]
        return Path(f"step-{max(found)}") if found else None

    def drop_after(self, folder: Path, step: int) -> None:
        self.checkpoints = [s for s in self.checkpoints if s <= step]

    def rollback_to(self, path: Path) -> int:
        self.guard.rollbacks = []  # what the checkpoint knew
        return int(path.name.removeprefix("step-"))


def test_weights_go_back_and_the_data_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [10, 20, 30], now=33, refused=4, rollbacks=[])
    rollback.rollback(run)  # type: ignore[arg-type]
    assert run.checkpoints == [10, 20], "step 30 was taken when step 30 was refused"
    assert run.guard.rollbacks == [{"at": 33, "to": 20}] and run.guard.in_a_row == 0
    assert [(e.first_step, e.skip) for e in run.batches.ledger.entries] == [
        (0, False), (20, True), (33, False)]
    assert run.told[0] == {"event": "rollback", "step": 33, "back_to": 20, "refused": 4, "text":
                           "steps 30 to 33 were refused in a row (the loss is nan): weights and optimizer "
                           "are those of step 20 again, and the samples of steps 21 to 33 are passed over"}


def test_a_second_time_it_goes_further_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [5, 10, 20, 33], now=37, refused=4, rollbacks=[{"at": 33, "to": 20}])
    rollback.rollback(run)  # type: ignore[arg-type]
    assert run.guard.rollbacks == [{"at": 33, "to": 20}, {"at": 37, "to": 10}]
    again = Run(monkeypatch, [5, 10, 37], now=41, refused=4, rollbacks=run.guard.rollbacks)
    rollback.rollback(again)  # type: ignore[arg-type]
    assert again.guard.rollbacks[-1] == {"at": 41, "to": 5}


def test_after_steps_that_were_learned_the_newest_checkpoint_is_good_again(
        monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [10, 20, 33, 40], now=47, refused=4, rollbacks=[{"at": 33, "to": 20}])
    rollback.rollback(run)  # type: ignore[arg-type]
    assert run.guard.rollbacks[-1] == {"at": 47, "to": 40}


@pytest.mark.parametrize(("checkpoints", "rollbacks", "said"), [
    ([], [], "of checkpoints there is none before them"),
    ([20, 33], [{"at": 33, "to": 20}], "of checkpoints there is none before step 20, which was tried")])
def test_where_nothing_is_left_to_try_the_run_ends(monkeypatch: pytest.MonkeyPatch, checkpoints: list[int],
                                                   rollbacks: list[dict[str, int]], said: str) -> None:
    run = Run(monkeypatch, checkpoints, now=37, refused=4, rollbacks=rollbacks)
    with pytest.raises(UserError) as e:
        rollback.rollback(run)  # type: ignore[arg-type]
    assert str(e.value).startswith("steps 34 to 37 were refused in a row (the last one: the loss is nan)")
    assert said in str(e.value)
    assert run.checkpoints == checkpoints and run.told == [], "nothing was changed"
