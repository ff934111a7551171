"""The all-reduce at the end of a step: one signal is everybody's, and a checkpoint appears when
all have written it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def synced(run: str) -> dict[str, Any]:
    """Runs inside ranks: take a checkpoint, and go on with steps that do nothing;
    only rank 1 is asked to stop."""
    import time

    from megatron_sov import recipes
    from megatron_sov.config import apply_settings
    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.optimizer.optimizer import Optimizer
    from megatron_sov.mcore.parallel import world
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.checkpointer import Checkpointer
    from megatron_sov.train.state import TrainState

    config = apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16",
        "model.num_layers=1"])
    place, folder = world.join(config.parallel), RunFolder(Path(run))
    model = build(config.model, config.parallel, config.train)
    init.initialise(model, config.model, 1)
    optimizer = Optimizer(model, config.optim)
    parts = {name: Memory(name) for name in ("order", "guard")}
    saved: list[Any] = []
    checkpointer = Checkpointer(config, folder, [], model, optimizer, parts["order"],
                                {"guard": parts["guard"]}, saved.append)
    stop: Any = SimpleNamespace(reason=None)
    checkpointer.save(TrainState(3, 77, 0.5))
    steps = 0
    while not saved and steps < 10_000:
        asked = checkpointer.sync(stop)
        steps += 1
        time.sleep(0.01)
    told = [asked, [s.path.name for s in saved]]
    stop.reason = "SIGTERM" if place.rank == 1 else None
    told.append(checkpointer.sync(stop))

    for part in parts.values():
        part.value = "changed"
    done = checkpointer.load(folder.checkpoint(3), data_too=False)
    went_on = [part.value for part in parts.values()]
    checkpointer.load(folder.checkpoint(3))
    waiting = Checkpointer(apply_settings(config, ["train.async_save=false"]), folder, [], model, optimizer,
                           parts["order"], {"guard": parts["guard"]}, saved.append)
    waiting.save(TrainState(4, 88, 0.5))
    waiting.finish()
    copied = [bool(c._saver._snapshot._memory) for c in (checkpointer, waiting)]
    world.leave()
    return {"told": told, "done": [done.step, done.tokens, done.wall_s], "went on": went_on, "copied": copied,
            "resumed": [part.value for part in parts.values()]}


class Memory:
    """Something that remembers one word."""

    def __init__(self, value: str) -> None:
        self.value = value

    def state(self) -> dict[str, Any]:
        """Return the word."""
        return {"value": self.value}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a word back."""
        self.value = state["value"]


@pytest.mark.distributed
def test_a_step_ends_with_what_all_processes_have_to_tell(ranks: Any, job: Any, tmp_path: Path) -> None:
    (found,) = ranks(job(__file__, "synced", 2, {"run": str(tmp_path / "run")}))
    copied = [any(of_rank) for of_rank in zip(*(one["copied"] for one in found), strict=True)]
    assert copied == [True, False], "nothing changes while a run waits: no copy is needed"
    for one in found:
        assert one["told"] == [False, ["step-3"], True], ("no call but `sync` completes a checkpoint "
                                                          "while a run trains")
        assert one["done"] == [3, 77, 0.5]
        assert one["went on"] == ["changed", "guard"] and one["resumed"] == ["order", "guard"]
