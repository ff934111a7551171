"""Planted faults are attributed to their cause: a process, its memory, the data, or the optimization."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.engine.model import replica_checks
from megatron_sov.model.config import apply_settings
from megatron_sov.train.loop import train_step
from megatron_sov.train.recovery import attribute_rejected_step
from tests.tiny import tiny_trainer

SETTINGS = ("model.num_layers=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            "train.global_batch_size=8", "train.micro_batch_size=4", "train.precision=fp32",
            "guards.hang_timeout_s=0", "train.deterministic=true", "guards.attribute=true", "train.steps=9")


def update(trainer: Any) -> Any:
    """Do a step as the loop does."""
    result = train_step(trainer)
    attribute_rejected_step(trainer)
    return result


@pytest.fixture
def make(alone: Any, packed_data: Any, tmp_path: Path) -> Iterator[Any]:
    """Return `make(*settings, faults)`: a small run whose events can be read."""
    made = []

    def run(*settings: str, faults: str = "") -> Any:
        trainer = tiny_trainer(str(packed_data.text), *SETTINGS, *settings, run=tmp_path, faults=faults,
                               place=alone)
        told: list[dict[str, Any]] = []
        trainer.recorder.events = SimpleNamespace(  # type: ignore[assignment]
            write=lambda event, **fields: told.append({"event": event, **fields}), is_open=False,
            close=lambda: None)
        made.append(trainer)
        return trainer, lambda: [e for e in told if e["event"] == "attribution"]

    yield run
    for trainer in made:
        trainer.close()


def test_a_process_with_changing_losses_is_named(make: Any) -> None:
    trainer, told = make(faults="nan@step=2")
    assert update(trainer) is not None
    weights = [p.clone() for p in trainer.model.parameters()]
    assert update(trainer) is None
    (event,) = told()
    assert (event["verdict"], event["ranks"], event["step"]) == ("process", (0,), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert update(trainer) is not None, "and the run goes on"


def test_a_process_with_changing_gradients_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = make()
    assert update(trainer) is not None
    sound, faults = trainer.expert_load.before_sync, [torch.nan]

    def once() -> None:
        if faults:
            replica_checks.list_gradients(trainer.model)[0][0] = faults.pop()
        sound()

    monkeypatch.setattr(trainer.expert_load, "before_sync", once)
    assert update(trainer) is None
    assert (told()[0]["verdict"], told()[0]["ranks"]) == ("process", (0,)), told()[0]["text"]


def test_data_whose_loss_is_no_number_are_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = make()
    learn = trainer.objective.loss
    bad: list[int] = []

    def loss(hidden: Any, head: Any, batch: Any) -> Any:
        sums = learn(hidden, head, batch)
        if bad and any(o.segment.document == bad[0] for o in batch.origins):
            sums.by_source.mul_(torch.nan)
            sums.terms["lm"] = sums.terms["lm"] * torch.nan
        return sums

    monkeypatch.setattr(trainer.objective, "loss", loss)
    assert update(trainer) is not None
    batch = trainer.objective.collect(trainer.policy, 1)
    bad.append(batch.micro_batches[1].origins[0].segment.document)
    monkeypatch.setattr(trainer.objective, "collect", lambda policy, step: batch)
    assert update(trainer) is None
    (event,) = told()
    assert event["verdict"] == "data", event["text"]
    name = trainer.sources[0].name
    assert f"{name} document {bad[0]}" in event["documents"]


def test_weights_that_a_large_rate_has_spoilt_are_not_the_datas_fault(
        make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = make()
    assert update(trainer) is not None
    usual = trainer.schedule.learning_rate
    monkeypatch.setattr(trainer.schedule, "learning_rate", lambda step: usual(step) * 1e30)
    assert update(trainer) is not None, "the rate spoils the weights after the loss was computed"
    assert update(trainer) is None
    assert told()[0]["verdict"] == "optimisation", told()[0]["text"]


def test_a_first_step_is_not_put_down_to_anything(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = make()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    assert update(trainer) is None
    assert told()[0]["verdict"] == "undecided" and told()[0]["documents"]


def test_attribution_requires_reproducible_bits() -> None:
    with pytest.raises(UserError, match=r"guards\.attribute = true needs"):
        apply_settings(recipes.get("tiny-solar-open"), ["guards.attribute=true"]).check()
