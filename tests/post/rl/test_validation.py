"""Validation of a run's policies: when it runs and which figures it records, on four prompts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl import validation
from megatron_sov.post.rl.validation import SampledRounds, Validation, compute_figures, digest_conditions
from megatron_sov.rollouts.prompts import PromptList, RolloutPrompt
from megatron_sov.rollouts.rows import Key, RewardRow, Rollout, format_part_name
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.runs.obs.validation import extract_curves, format_validation
from megatron_sov.runs.rounds import Policy

VERSION = "0123456789abcdef"
POLICY = Policy(Path("run"), 0, "0" * 64)
MEASURED = {"prompts": "p", "reward": "r", "sampling": "s"}
REWARDS = {"a": (1.0, 0.0), "b": (0.0, 0.0), "c": (1.0, None)}


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """A validation of three prompts in two pieces, with two responses each; one has no reward."""
    result = RolloutStore.create(tmp_path / "validation", "0" * 64, 100)
    for piece, prompts in enumerate(("ab", "c")):
        rows = [Rollout(Key(prompt, sample, "p", "s"), 1, 0,
                        {"prompt": prompt * 3000, "domain": "x" if prompt == "a" else "y"},
                        np.ones(1, np.int32), np.ones(n, np.int32), np.zeros(n, np.float32),
                        np.zeros(n, np.int32), "length" if sample else "stop", prompt, 1.0, "megatron", 0, 1)
                for prompt in prompts for sample, n in enumerate((2, 3))]
        result.add_rollouts(format_part_name(1, piece), rows, {})
        result.add_rewards(VERSION, format_part_name(1, piece), [
            RewardRow(row.key, 0, VERSION, reward, "scored" if reward is not None else "timeout",
                      {} if reward is None else {"format": reward / 2})
            for row in rows for reward in [REWARDS[row.key.prompt][row.key.sample]]], {})
    return result


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(validation, "run_on_main", lambda world, action: action())
    told: list[tuple[str, dict[str, Any]]] = []
    return SimpleNamespace(step=0, world=None, told=told, events=SimpleNamespace(
        write=lambda name, **fields: told.append((name, fields))))


def validation_of(store: RolloutStore, every: int = 2, num_responses: int = 6,
                  measured: Mapping[str, str] = MEASURED) -> tuple[Any, list[int]]:
    asked: list[int] = []

    def write(view: Any, number: int, policy: Any, asked_to_stop: Any) -> dict[str, float]:
        asked.append(number)
        return {"write_s": 2.0}

    rollout = RolloutConfig(rounds=5, validation_every_rounds=every)
    rollouts: Any = SimpleNamespace(
        write=write, judge=lambda *_: {}, reward=SimpleNamespace(version=VERSION),
        settings=SimpleNamespace(store=SimpleNamespace(open=lambda: store)))
    return Validation(run=store.path.parent, rollouts=rollouts, rollout=rollout, num_responses=num_responses,
                      right_from=1.0, samples=SampledRounds(2, 6), measured_by=measured), asked


def test_validation_figures_cover_all_responses_and_each_domain(store: RolloutStore, view: Any) -> None:
    validation, _ = validation_of(store)
    assert validation.validate(view, 1, POLICY, lambda: False) is None
    (name, samples), (event, told) = view.told
    assert event == "validation" and told["statuses"] == {"scored": 5, "timeout": 1}
    # a prompt counts once, even if only some of its responses have a reward
    assert told["reward"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert [(one["k"], one["value"]) for one in told["pass_at_k"]] == [(1, pytest.approx(0.5))]
    assert (told["response_tokens"], told["truncated"], told["write_s"]) == (2.5, 0.5, 2.0)
    assert told["components"] == {"format": pytest.approx((1 + 0 + 0 + 0 + 1) / 10)}
    assert [one["value"] for one in told["domains"]["x"]["pass_at_k"]] == [0.5, 1.0]
    assert told["domains"]["y"]["reward"] == 0.5
    assert told["text"] == "held-out reward 0.5, pass@1 50.0% (6 responses to 3 prompts)"
    assert name == "responses" and samples["of"] == "validation"
    first, second = samples["rows"]  # of two prompts, though the first one has two
    assert first["prompt"] == "a" * 2000 + " … (1,000 more characters)" and second["response"] == "b"
    assert (first["reward"], first["components"], first["tokens"]) == (1.0, {"format": 0.5}, 2)


def test_policies_are_validated_when_it_is_due_and_once(store: RolloutStore, view: Any,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    for every, due in ((2, [1, 3, 5, 6]), (0, [1, 6]), (10, [1, 6])):
        validation, asked = validation_of(store, every)
        monkeypatch.setattr(validation, "_record_figures", lambda *_: None)
        for number in range(1, 7):
            view.step = number - 1
            assert validation.validate(view, number, POLICY, lambda: False) is None
        assert asked == due
    log = EventLog(store.path.parent / "events.jsonl")
    log.write("validation", step=0)  # before the run was killed
    log.close()
    again, asked = validation_of(store)
    view.step = 0
    assert again.validate(view, 1, POLICY, lambda: False) is None and asked == [] and not view.told


def test_changed_validation_settings_are_refused_before_training(store: RolloutStore, view: Any) -> None:
    validation, _ = validation_of(store)
    validation.validate(view, 1, POLICY, lambda: False)
    log = EventLog(store.path.parent / "events.jsonl")
    log.write("validation", **view.told[-1][1])
    log.close()
    view.step = 1
    again, asked = validation_of(store)
    assert again.validate(view, 2, POLICY, lambda: False) is None and asked == [], "not due"
    other, _ = validation_of(store, measured={**MEASURED, "prompts": "q", "reward": "t"})
    with pytest.raises(UserError, match="step 0 were validated"):
        other.validate(view, 2, POLICY, lambda: False)


def test_digests_of_validation_conditions() -> None:
    """Excludes everything without effect on responses and verdicts: the order of prompts, and the number at a
    time."""
    prompts = PromptList.from_prompts(RolloutPrompt(f"{i:016x}", {"prompt": str(i)}) for i in range(3))
    rollout = RolloutConfig().for_validation(3)

    def measured(asked: PromptList = prompts, reward: str = "v", right_from: float = 1.0,
                 **more: Any) -> dict[str, str]:
        return digest_conditions(prompts=asked, reward_version=reward, rollout=replace(rollout, **more),
                                 chosen_by={"plain": True}, right_from=right_from)

    assert measured(prompts[::-1]) == measured(piece_prompts=7, rounds=9) == measured()

    def others(found: dict[str, str]) -> list[str]:
        return [name for name, digest in measured().items() if found[name] != digest]

    assert others(measured(prompts[:2])) == ["prompts"]
    assert others(measured(reward="w")) == others(measured(right_from=0.5)) == ["reward"]
    assert others(measured(samples_per_prompt=9)) == others(measured(temperature=0.5)) == ["sampling"]


def test_a_stopped_validation_ends_the_run_without_figures(store: RolloutStore, view: Any) -> None:
    validation, asked = validation_of(store, num_responses=8)
    assert validation.validate(view, 1, POLICY, lambda: True) == (
        "asked to stop while validating the policy of step 0: 6 of 8 responses are judged")
    assert asked == [1] and not view.told


def test_validation_without_reward_records_lengths(tmp_path: Path, store: RolloutStore) -> None:
    failed = [RewardRow(row.key, 0, "other", None, "failed", {}) for row in
              store.read_rollouts(format_part_name(1, 1))]
    store.add_rewards("other", format_part_name(1, 1), failed, {})
    figures = compute_figures(store, 1, "other", 1.0)
    assert (figures["num_samples"], figures["reward"], figures["pass_at_k"]) == (2, None, [])
    assert extract_curves(figures) == {"response_tokens": 2.5, "truncated": 0.5}
    assert format_validation(figures) == "no response has a reward (2 responses to 1 prompt)"
