"""The trainer: state of an objective in checkpoints, token counts, and errors."""

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.trainer import Trainer
from tests.tiny import RUN


def train_and_fail(data: str, run: str) -> dict[str, Any]:
    """Inside a rank: take a step, resume from its checkpoint, then resume with other data and take a NaN
    step."""
    config = apply_settings(recipes.get("tiny-solar-open"), [
        *RUN, "model.num_layers=1", "train.global_batch_size=2", "train.micro_batch_size=2", "train.steps=10",
        "guards.skip=false"])
    imported_before = set(sys.modules)
    place = world.join_world(config.parallel)
    folder = RunFolder(Path(run))
    folder.create()
    folder.declare(config)
    sources = open_sources({data: 1.0}, 368)

    class CountingObjective(LanguageModelling):
        """Counts the batches that it has collected."""

        comparable_loss = False

        def __init__(self, context: Any) -> None:
            super().__init__(context)
            self.context, self.collected = context, 0
            with context.waiting():
                context.write_event("made")

        def collect(self, policy: Any, step: int) -> Any:
            with self.context.waiting():
                self.context.write_event("collected", step=step)
                self.watched = trainer.guards.watchdog._watched
                self.collected += 1
            return super().collect(policy, step)

        def state(self) -> dict[str, Any]:
            return {"collected": self.collected}

        def restore(self, state: dict[str, Any]) -> None:
            self.collected = state["collected"]

    trainer = Trainer(config, place, folder, sources, CountingObjective)
    trainer.open_records()
    probed_steps: list[int] = []
    trainer.guards.sdc.is_probe_due = probed_steps.append  # type: ignore[method-assign, assignment]
    trainer.guards.watchdog.begin(1)
    train_step(trainer)
    planned, consumed = trainer.batches.planned_tokens(), trainer.batches.consumed_tokens()
    trainer.save()
    trainer.checkpointer.finish()
    checkpoint = folder.checkpoint(1)
    results = {"planned": planned, "consumed": consumed, "counted": trainer.state.tokens,
               "probed": probed_steps, "imported": sorted(set(sys.modules) - imported_before)}
    resumed = Trainer(config, place, folder, sources, CountingObjective)
    resumed.resume(checkpoint)
    objective: Any = trainer.objective
    results |= {"watched": [objective.watched, trainer.guards.watchdog._watched[0]],  # type: ignore[index]
                "events": [e["event"] for e in read_events(folder.path / EVENTS)],
                "remembers": resumed.objective.collected,  # type: ignore[attr-defined]
                "compares": trainer.guards.step_guard.compares_losses}
    resumed.checkpointer._data = dict.fromkeys(resumed.checkpointer._data, "0" * 64)
    for name, action in (("packed again", lambda: resumed.resume(checkpoint)),
                         ("no number", lambda: take_nan_step(trainer))):
        try:
            action()
        except UserError as e:
            results[name] = str(e)
    results["saved"] = sorted(p.name for p in folder.checkpoints.iterdir())
    trainer.close()
    resumed.close()
    return results


def take_nan_step(trainer: Any) -> None:
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    train_step(trainer)


def test_a_spoilt_step_and_changed_data_are_refused(ranks: Any, job: Any, packed_data: Any,
                                                    tmp_path: Path) -> None:
    ((results,),) = ranks(job(__file__, "train_and_fail", 1,
                              {"data": str(packed_data.text), "run": str(tmp_path / "run")}))
    assert "source 'even': its data was packed again after" in results["packed again"]
    assert "step 2: the loss is nan" in results["no number"]
    assert "lower optim.lr = 0.004" in results["no number"]
    assert results["remembers"] == 1, "the checkpoint has the state of the objective"
    assert results["compares"] is False
    assert results["watched"] == [None, 1] and "collected" in results["events"]
    assert results["saved"] == ["step-1"], "the spoilt step is not saved"
    assert results["probed"] == [1, 2], "each step is probed if it is due"
    assert sum(results["planned"].values()) == 2 * 32  # samples x tokens
    assert sum(results["consumed"].values()) == results["counted"] < 2 * 32, (
        "padding tokens are planned, but not consumed")
    assert not [name for name in results["imported"] if name.startswith("torch._dynamo")], (
        "a step must import no module: every rank would import it again, instead of its launcher for all")
