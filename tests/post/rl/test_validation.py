"""Validation of a run's policies on held-out prompts: when it runs, and the figures that it records."""

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
    """A store with one validation: three prompts in two pieces, two responses each; one has no reward."""
    store = RolloutStore.create(tmp_path / "validation", "0" * 64, 100)
    for piece, prompts in enumerate(("ab", "c")):
        rows = [Rollout(Key(prompt, sample, "p", "s"), 1, 0,
                        {"prompt": prompt * 3000, "domain": "x" if prompt == "a" else "y"},
                        np.ones(1, np.int32), np.ones(n, np.int32), np.zeros(n, np.float32),
                        np.zeros(n, np.int32), "length" if sample else "stop", prompt, 1.0, "megatron", 0, 1)
                for prompt in prompts for sample, n in enumerate((2, 3))]
        store.add_rollouts(format_part_name(1, piece), rows, {})
        store.add_rewards(VERSION, format_part_name(1, piece), [
            RewardRow(row.key, 0, VERSION, reward, "scored" if reward is not None else "timeout",
                      {} if reward is None else {"format": reward / 2})
            for row in rows for reward in [REWARDS[row.key.prompt][row.key.sample]]], {})
    return store


@pytest.fixture
def trainer_double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Double of a trainer in one process; `recorded` has its events as (name, fields)."""
    monkeypatch.setattr(validation, "run_on_main", lambda world, action: action())
    recorded: list[tuple[str, dict[str, Any]]] = []
    return SimpleNamespace(step=0, world=None, recorded=recorded, events=SimpleNamespace(
        write=lambda name, **fields: recorded.append((name, fields))))


def build_validation(store: RolloutStore, every_rounds: int = 2, num_responses: int = 6,
                     measured_by: Mapping[str, str] = MEASURED) -> tuple[Any, list[int]]:
    """Return a validation over stored rounds, and the list of rounds that it has written."""
    written_rounds: list[int] = []

    def write_round(trainer_double: Any, number: int, policy: Any, is_stopping: Any) -> dict[str, float]:
        written_rounds.append(number)
        return {"write_s": 2.0}

    rollout = RolloutConfig(rounds=5, validation_every_rounds=every_rounds)
    rollouts: Any = SimpleNamespace(
        write=write_round, judge=lambda *_: {}, reward=SimpleNamespace(version=VERSION),
        settings=SimpleNamespace(store=SimpleNamespace(open=lambda: store)))
    return Validation(run=store.path.parent, rollouts=rollouts, rollout=rollout, num_responses=num_responses,
                      right_from=1.0, samples=SampledRounds(2, 6), measured_by=measured_by), written_rounds


def test_validation_figures_cover_all_responses_and_each_domain(store: RolloutStore,
                                                                trainer_double: Any) -> None:
    validation, _ = build_validation(store)
    assert validation.validate(trainer_double, 1, POLICY, lambda: False) is None
    (samples_event, samples), (event, figures) = trainer_double.recorded
    assert event == "validation" and figures["statuses"] == {"scored": 5, "timeout": 1}
    # Every prompt counts once, also if only some of its responses have a reward.
    assert figures["reward"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert [(point["k"], point["value"]) for point in figures["pass_at_k"]] == [(1, pytest.approx(0.5))]
    assert (figures["response_tokens"], figures["truncated"], figures["write_s"]) == (2.5, 0.5, 2.0)
    assert figures["components"] == {"format": pytest.approx((1 + 0 + 0 + 0 + 1) / 10)}
    assert [point["value"] for point in figures["domains"]["x"]["pass_at_k"]] == [0.5, 1.0]
    assert figures["domains"]["y"]["reward"] == 0.5
    assert figures["text"] == "held-out reward 0.5, pass@1 50.0% (6 responses to 3 prompts)"
    assert samples_event == "responses" and samples["of"] == "validation"
    first, second = samples["rows"]  # one response for each of two prompts
    assert first["prompt"] == "a" * 2000 + " … (1,000 more characters)" and second["response"] == "b"
    assert (first["reward"], first["components"], first["tokens"]) == (1.0, {"format": 0.5}, 2)


def test_policies_are_validated_once_when_due(store: RolloutStore, trainer_double: Any,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for every_rounds, due_rounds in ((2, [1, 3, 5, 6]), (0, [1, 6]), (10, [1, 6])):
        validation, written_rounds = build_validation(store, every_rounds)
        monkeypatch.setattr(validation, "_record_figures", lambda *_: None)
        for number in range(1, 7):
            trainer_double.step = number - 1
            assert validation.validate(trainer_double, number, POLICY, lambda: False) is None
        assert written_rounds == due_rounds
    log = EventLog(store.path.parent / "events.jsonl")
    log.write("validation", step=0)  # before the run was killed
    log.close()
    resumed, written_rounds = build_validation(store)
    trainer_double.step = 0
    assert resumed.validate(trainer_double, 1, POLICY, lambda: False) is None
    assert written_rounds == [] and not trainer_double.recorded


def test_changed_validation_settings_are_refused_before_training(store: RolloutStore,
                                                                 trainer_double: Any) -> None:
    validation, _ = build_validation(store)
    validation.validate(trainer_double, 1, POLICY, lambda: False)
    log = EventLog(store.path.parent / "events.jsonl")
    log.write("validation", **trainer_double.recorded[-1][1])
    log.close()
    trainer_double.step = 1
    resumed, written_rounds = build_validation(store)
    assert resumed.validate(trainer_double, 2, POLICY, lambda: False) is None
    assert written_rounds == [], "not due"
    changed, _ = build_validation(store, measured_by={**MEASURED, "prompts": "q", "reward": "t"})
    with pytest.raises(UserError, match="step 0 were validated"):
        changed.validate(trainer_double, 2, POLICY, lambda: False)


def test_digests_of_validation_conditions() -> None:
    """Settings without effect on responses and verdicts, such as the order of prompts, change no digest."""
    prompts = PromptList.from_prompts(RolloutPrompt(f"{i:016x}", {"prompt": str(i)}) for i in range(3))
    rollout = RolloutConfig().for_validation(3)

    def compute_digests(given_prompts: PromptList = prompts, reward: str = "v", right_from: float = 1.0,
                        **changes: Any) -> dict[str, str]:
        return digest_conditions(prompts=given_prompts, reward_version=reward,
                                 rollout=replace(rollout, **changes), chosen_by={"plain": True},
                                 right_from=right_from)

    assert compute_digests(prompts[::-1]) == compute_digests(piece_prompts=7, rounds=9) == compute_digests()

    def list_changed(digests: dict[str, str]) -> list[str]:
        return [name for name, value in compute_digests().items() if digests[name] != value]

    assert list_changed(compute_digests(prompts[:2])) == ["prompts"]
    assert list_changed(compute_digests(reward="w")) == list_changed(compute_digests(right_from=0.5)) == [
        "reward"]
    for changed_digest in (compute_digests(samples_per_prompt=9), compute_digests(temperature=0.5)):
        assert list_changed(changed_digest) == ["sampling"]


def test_a_stopped_validation_ends_the_run_without_figures(store: RolloutStore, trainer_double: Any) -> None:
    validation, written_rounds = build_validation(store, num_responses=8)
    assert validation.validate(trainer_double, 1, POLICY, lambda: True) == (
        "asked to stop while validating the policy of step 0: 6 of 8 responses are judged")
    assert written_rounds == [1] and not trainer_double.recorded


def test_validation_without_reward_records_lengths(tmp_path: Path, store: RolloutStore) -> None:
    failed = [RewardRow(row.key, 0, "other", None, "failed", {}) for row in
              store.read_rollouts(format_part_name(1, 1))]
    store.add_rewards("other", format_part_name(1, 1), failed, {})
    figures = compute_figures(store, 1, "other", 1.0)
    assert (figures["num_samples"], figures["reward"], figures["pass_at_k"]) == (2, None, [])
    assert extract_curves(figures) == {"response_tokens": 2.5, "truncated": 0.5}
    assert format_validation(figures) == "no response has a reward (2 responses to 1 prompt)"
