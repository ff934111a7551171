"""What a replay has to come to: every token and reward, and every bit where the layout is the run's; and
which settings made which steps of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.audit.repeating import RepeatOutcome, learned_share, weights_apart
from megatron_sov.audit.replaying import (
    LAYOUT_BOUND, Replay, ReplayedRound, RunStretch, refuse_untold, stretches_of)
from megatron_sov.base.artifacts import new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorWriter, write_index
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.checkpoints import ADAPTER, BASE, KIND
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.launch_environment import COMMAND_VARIABLE
from megatron_sov.runs.obs.events import EVENTS, EventLog

SAME = Replay("run", 1, 6, True, (ReplayedRound(1, 8, 0, 0, True),), RepeatOutcome.EQUAL.value, "", 0.0, 0.0)
OTHER_BITS = RepeatOutcome.DIFFERENT.value


@pytest.mark.parametrize(("own_layout", "changed", "passes"), [
    (True, {}, True),
    (True, {"weights": OTHER_BITS, "distance": 1e-9}, False),
    (True, {"rounds": (ReplayedRound(1, 8, 0, 0, False),)}, False),  # other advantages of the same responses
    (False, {"weights": OTHER_BITS, "distance": LAYOUT_BOUND / 10, "moved": 0.1}, True),
    (False, {"weights": OTHER_BITS, "distance": LAYOUT_BOUND * 10, "moved": 0.1}, False),
    (False, {"weights": OTHER_BITS, "distance": float("inf"), "moved": 0.1}, False),
    # as far apart as they have moved: a small learning rate
    (False, {"weights": OTHER_BITS, "distance": LAYOUT_BOUND / 10, "moved": LAYOUT_BOUND / 10}, False),
    (False, {"rounds": (ReplayedRound(1, 8, 0, 0, False, ("steps",)),)}, False),
    (False, {"rounds": (ReplayedRound(1, 8, 1, 0, True),)}, False),
    (False, {"rounds": (ReplayedRound(1, 8, 0, 1, True),)}, False)])
def test_what_passes(own_layout: bool, changed: dict[str, object], passes: bool) -> None:
    assert dataclasses.replace(SAME, own_layout=own_layout, **changed).passed == passes


def adapter(path: Path, config: RunConfig, **factors: Sequence[float]) -> Path:
    """Write a checkpoint of an adapter with given factors."""
    with new_artifact(path, KIND) as artifact:
        writer = TensorWriter(artifact.path, ADAPTER)
        for name, values in factors.items():
            writer.add(f"adapter.x.{name}", torch.tensor(values))
        write_index(artifact.path, ADAPTER, [writer.finish()])
        artifact.settings, artifact.content = config.to_dict(), {BASE: {"path": "base", "sha256": ""}}
    return path


def test_adapters_are_compared_by_their_own_weights(tmp_path: Path) -> None:
    config = recipes.get("tiny-qwen3")
    one = adapter(tmp_path / "one", config, lora_A=[3.0, 4.0], lora_B=[0.3, 0.4])
    other = adapter(tmp_path / "other", config, lora_A=[3.0, 4.0], lora_B=[0.0, 0.0])
    size = (5**2 + 0.5**2) ** 0.5
    assert weights_apart(other, one) == pytest.approx(0.5 / size)
    assert learned_share(one) == pytest.approx(0.5 / size), "B begins at zero: the other has learned nothing"
    assert (weights_apart(one, one), learned_share(other)) == (0, 0)


@pytest.fixture
def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[RunConfig]]:
    """Return a run up to step 8, and its settings: it went on from step 4 by others, which a kill took back,
    then by others again, and from step 6 as from step 4 the first time."""
    config = apply_settings(recipes.get("tiny-qwen3"), ["rollout.steps_per_round=2", "rollout.rounds=3"])
    configs = [apply_settings(config, [f"rollout.rounds={n}", f"train.micro_batch_size={n}"])
               for n in (3, 4, 5)]
    folder = RunFolder(tmp_path / "run")
    for step, number, word in ((0, 0, "run"), (4, 1, "lost"), (4, 2, "more"), (6, 1, "last")):
        monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(["rl", "run", word]))
        folder.create()
        folder.declare(configs[number], step)
        EventLog(folder.path / EVENTS).close()
    adapter(folder.checkpoint(4), configs[0], lora_B=[1.0])
    adapter(folder.checkpoint(8), configs[1], lora_B=[1.0])
    return folder.path, configs


def test_every_step_has_the_settings_and_the_command_that_made_it(
        resumed: tuple[Path, list[RunConfig]]) -> None:
    run, configs = resumed
    found = stretches_of(run)
    assert [(s.first, s.end, s.began.words[-1]) for s in found] == [
        (1, 4, "run"), (5, 6, "more"), (7, 8, "last")]
    assert [s.config for s in found] == [configs[0], configs[2], configs[1]]
    assert found[1].changes(found[0]) == ["train.micro_batch_size was 3, is 5", "rollout.rounds was 3, is 5"]
    refuse_untold(run, found, 0)


def test_a_change_that_no_record_tells_of_is_refused_by_name(resumed: tuple[Path, list[RunConfig]]) -> None:
    """As of a run that an earlier version resumed."""
    run, configs = resumed
    untold = [RunStretch(1, 8, configs[1], stretches_of(run)[-1].began)]
    with pytest.raises(UserError, match=r"step-4: step 4, of round 2, was made with train.micro_batch_size = "
                                        r"3, and by the records of the run it is 4"):
        refuse_untold(run, untold, 0)
    refuse_untold(run, untold, 4)  # --from round 3: what comes behind step 4 was made by these
    with open(run / EVENTS, "a") as out:
        out.write(json.dumps({"event": "run_start", "time_s": 0, "resumed_from": 6, "num_ranks": 2}) + "\n")
    with pytest.raises(UserError, match=r"step 7, of round 4, was made with --nproc = 2, and .* it is 1"):
        refuse_untold(run, untold, 4)

    events = run / EVENTS
    events.write_text(events.read_text().replace('"was": {', '"was": 7, "x": {', 1))
    with pytest.raises(UserError, match=r"events.jsonl: an event 'settings' is damaged"):
        stretches_of(run)
