"""The trainer: refused settings, and figures of a step."""

import sys
from pathlib import Path
from typing import Any

import torch


def refusals(data: str, run: str) -> dict[str, Any]:
    """Runs inside a rank: the trainer's errors for a NaN loss, and for data that was packed again."""
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

    config = apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", "model.hidden_size=32", "model.num_layers=1",
        'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=2",
        "train.micro_batch_size=2", "train.steps=10", "guards.skip=false"])
    before = set(sys.modules)
    place = world.join_world(config.parallel)
    folder = RunFolder(Path(run))
    folder.create()
    folder.declare(config)
    sources = open_sources({data: 1.0}, 368)
    class Remembering(LanguageModelling):
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

    trainer = Trainer(config, place, folder, sources, Remembering)
    trainer.open_records()
    probed: list[int] = []
    trainer.guards.sdc.is_probe_due = probed.append  # type: ignore[method-assign, assignment]
    trainer.guards.watchdog.begin(1)
    train_step(trainer)
    planned, consumed = trainer.batches.planned_tokens(), trainer.batches.consumed_tokens()
    trainer.save()
    trainer.checkpointer.finish()
    saved = folder.checkpoint(1)
    said = {"planned": planned, "consumed": consumed, "counted": trainer.state.tokens, "path": saved.name,
            "probed": probed,
            "imported": sorted(set(sys.modules) - before)}
    again = Trainer(config, place, folder, sources, Remembering)
    again.resume(saved)
    objective: Any = trainer.objective
    said |= {"watched": [objective.watched, trainer.guards.watchdog._watched[0]],  # type: ignore[index]
             "events": [e["event"] for e in read_events(folder.path / EVENTS)],
             "remembers": again.objective.collected,  # type: ignore[attr-defined]
             "compares": trainer.guards.step_guard.compares_losses}
    again.checkpointer._data = dict.fromkeys(again.checkpointer._data, "0" * 64)
    for name, action in (("packed again", lambda: again.resume(saved)),
                         ("no number", lambda: _spoil(trainer))):
        try:
            action()
        except UserError as e:
            said[name] = str(e)
    said["saved"] = sorted(p.name for p in folder.checkpoints.iterdir())
    trainer.close()
    again.close()
    world.leave_world()
    return said


def _spoil(trainer: Any) -> None:
    from megatron_sov.train.loop import train_step

    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    train_step(trainer)


def test_a_spoilt_step_and_changed_data_are_refused(ranks: Any, job: Any, packed_data: Any,
                                                    tmp_path: Path) -> None:
    ((said,),) = ranks(job(__file__, "refusals", 1,
                           {"data": str(packed_data.text), "run": str(tmp_path / "run")}))
    assert "source 'even': its data was packed again after" in said["packed again"]
    assert "step 2: the loss is nan" in said["no number"] and "lower optim.lr = 0.004" in said["no number"]
    assert (said["remembers"], said["compares"]) == (1, False), "what an objective knows is in the checkpoint"
    assert said["watched"] == [None, 1] and "collected" in said["events"]
    assert said["saved"] == ["step-1"], "the spoilt step is not saved"
    assert said["probed"] == [1, 2], "each step is probed if it is due"
    assert sum(said["planned"].values()) == 2 * 32
    assert sum(said["consumed"].values()) == said["counted"] < 2 * 32, (
        "what is padding was planned and not consumed")
    assert not [name for name in said["imported"] if name.startswith("torch._dynamo")], (
        "every rank imports for itself what its launcher could have imported for all")
