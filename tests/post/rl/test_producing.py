"""Rounds that a run writes itself, with doubles of what writes and judges: which rounds, in which order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.config import RolloutConfig
from megatron_sov.generate.request import Batching
from megatron_sov.rollouts.store import Store
from megatron_sov.runs.policies import Policy

Steps = list[Any]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Return what is done, in order: without a model and without a reward."""
    from megatron_sov.post.rl import producing

    steps: Steps = []

    class Engine:
        def __init__(self, policy: object, batching: Batching) -> None:
            self.policy = policy

        def update(self, weights: None, version: int) -> None:
            steps.append(("policy", self.policy, version))

    class Job:
        def __init__(self, store: Store, claims: object, version: str, judge: object, rounds: range,
                     *_: object) -> None:
            steps.append(("judge", version, judge, list(rounds)))

        def run(self) -> None:
            pass

    def write(engine: Engine, take: object, held: Policy, writer: object, desk: Any) -> None:
        steps.append(("write", held.step, desk.missing.num_pieces))

    def newest(number: int, run: Path, start: Path, rollout: RolloutConfig) -> Policy:
        return Policy(run / "step", number - 1, "0" * 64)

    monkeypatch.setattr(producing, "MegatronEngine", Engine)
    monkeypatch.setattr(producing, "JudgingJob", Job)
    monkeypatch.setattr(producing, "write_rounds", write)
    monkeypatch.setattr(producing, "on_main", lambda world, action: action())
    monkeypatch.setattr(producing, "policy_of_round", lambda run, start, number, rollout: newest(
        number, run, start, rollout))
    return steps


@pytest.fixture
def produced(steps: Steps, tmp_path: Path) -> Callable[[int, RolloutConfig], Any]:
    """Return `produced(number, rollout)`: let a producer make that round."""
    from megatron_sov.post.rl.producing import Producer

    @contextlib.contextmanager
    def judging() -> Iterator[Any]:
        steps.append("reward begins")
        yield "judge"
        steps.append("reward ends")

    made: dict[RolloutConfig, Producer] = {}

    def produce(number: int, rollout: RolloutConfig) -> Producer:
        producer = made.setdefault(rollout, Producer(
            lambda: Store.create(tmp_path / "store", "sha256:0", 100), [], rollout, tmp_path / "run",
            tmp_path / "start", SimpleNamespace(chosen_by={}, write=None), Batching(), "v", judging, {}))
        view: Any = SimpleNamespace(world=None, policy="model", checkpointer=SimpleNamespace(
            finish=lambda: steps.append("saved")))
        assert producer.produce(view, number).keys() == {"write_s", "judge_s"}
        return producer

    return produce


def test_a_round_is_written_by_the_saved_model_and_judged_by_a_reward_that_begins_once(
        steps: Steps, produced: Callable[[int, RolloutConfig], Any]) -> None:
    rollout = RolloutConfig(rounds=2, prompts_per_round=4, piece_prompts=2)
    produced(1, rollout)
    produced(2, rollout).close()
    assert steps == [
        "saved", ("policy", "model", 0), ("write", 0, 2), "reward begins", ("judge", "v", "judge", [1]),
        "saved", ("policy", "model", 1), ("write", 1, 2), ("judge", "v", "judge", [2]), "reward ends"]


def test_a_policy_writes_as_many_rounds_as_it_may(steps: Steps,
                                                  produced: Callable[[int, RolloutConfig], Any]) -> None:
    rollout = RolloutConfig(rounds=4, prompts_per_round=4, piece_prompts=2, max_staleness=2)
    produced(1, rollout)
    produced(4, rollout)
    assert [step[-1] for step in steps if step[0] == "judge"] == [[1, 2, 3], [4]]
    assert [step[-1] for step in steps if step[0] == "write"] == [6, 2], "and none behind the last"
