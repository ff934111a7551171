"""The judging job: each response once per version of a reward, without generation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.judge.rewards.math_answers import Math
from megatron_sov.judge.rewards.reward import Result, run_reward
from megatron_sov.post.rl.reward import (
    ENVIRONMENT, JudgingJob, build_record, resolve_reward_version, start_judge)
from megatron_sov.rollouts.rows import STOP, UNFINISHED, Key, RewardRow, Rollout, StorePlan
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.work.progress.locks import Claims, IdleTimeout

SETTINGS = ["language=ko"]


def build_rollout(round_: int, prompt: int, response: str, **more: object) -> Rollout:
    row = Rollout(Key(f"{prompt:016x}", 0, "p" * 64, "s" * 16), round_, 0, {"prompt": "?", "answer": "1"},
                  np.array([1], np.int32), np.array([2, 3], np.int32), np.array([-1, -1], np.float32),
                  np.zeros(2, np.int32), STOP, response, 1.0, "test", 0.0, 1.0)
    return replace(row, **more)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """A store with two rounds; a response of the second round is unfinished."""
    result = RolloutStore.create(tmp_path / "store", "sha256:0", 10)
    result.add_rollouts("round-0001-piece-0000", [build_rollout(1, 0, "가나"), build_rollout(1, 1, "ab")], {})
    result.add_rollouts("round-0002-piece-0000", [
        build_rollout(2, 2, "가a", outcome={"reward": 0.5, "status": "scored", "components": {"x": 1},
                                           "reason": "", "reward_version": "v", "last_turn": "가a"}),
        build_rollout(2, 3, "가", finish_reason=UNFINISHED)], {})
    return result


class LengthReward:
    """Reward that is the length of a response; "ab" fails. `judged` has the responses of all calls."""

    def __init__(self) -> None:
        self.judged: list[str] = []

    def __call__(self, rows: Sequence[Rollout]) -> list[Result]:
        self.judged += [row.response for row in rows]
        return [Result(None, "failed", {}, "broken") if row.response == "ab"
                else Result(float(len(row.response)), "scored", {"n": 1, "said": "it", "part": {"ok": True}})
                for row in rows]


def build_job(store: RolloutStore, judge: LengthReward, version: str = "v1", **more: object) -> JudgingJob:
    return JudgingJob(**{  # type: ignore[arg-type]
        "store": store, "claims": Claims(store.claims, 60), "version": version, "judge": judge,
        "rounds": None, "provenance": {"reward": "script"}, **more})


def test_every_response_is_judged_once_and_a_new_version_judges_again(store: RolloutStore) -> None:
    reward = LengthReward()
    summary = build_job(store, reward, rounds=range(1, 2)).run()
    assert reward.judged == ["가나", "ab"] and (summary.parts, summary.unfinished) == (1, 0)
    assert build_job(store, reward).run().unfinished == 1
    assert reward.judged == ["가나", "ab", "가a"]
    assert build_job(store, reward).run().parts == 0 and len(reward.judged) == 3
    hashes = {part.name: part.manifest_sha256 for part in store.parts()}
    assert build_job(store, reward, "v2").run().tally.statuses == {"scored": 2, "failed": 1}
    assert {part.name: part.manifest_sha256 for part in store.parts()} == hashes
    first, second = store.read_rewards("v1", "round-0001-piece-0000")
    assert (first.reward, first.status, first.reward_version) == (2.0, "scored", "v1")
    assert first.components == {"n": 1.0, "part.ok": 1.0}
    # A reward that fails gives no reward, not a reward of 0.
    assert (second.reward, second.status, second.reason) == (None, "failed", "broken")
    assert len(store.read_rewards("v2", "round-0002-piece-0000")) == 1


def test_judging_waits_for_claims_of_other_jobs(store: RolloutStore) -> None:
    pauses_s: list[float] = []
    claim = Claims(store.claims, 60).take("reward-v1-round-0001-piece-0000")
    assert claim is not None

    def pause_and_renew(pause_s: float) -> None:
        pauses_s.append(pause_s)
        assert claim.renew()

    reward = LengthReward()
    assert build_job(store, reward, wait_s=6.0, patience=IdleTimeout(pause_and_renew)).run().left == 1
    assert pauses_s == [5.0, 1.0] and reward.judged == ["가a"]
    assert build_job(store, reward, patience=IdleTimeout(pause_and_renew)).run().left == 1
    assert build_job(store, reward, claimed_wait_s=3.0, patience=IdleTimeout(pause_and_renew)).run().left == 1
    assert pauses_s[2:] == [5.0, 3.0], (
        "until the other job has renewed its claim, and then for `claimed_wait_s` seconds")
    claim.release()
    assert build_job(store, reward).run().left == 0


def test_judging_takes_over_claims_of_killed_jobs(store: RolloutStore) -> None:
    assert Claims(store.claims, 60).take("reward-v1-round-0001-piece-0000") is not None
    now_s = 0.0

    def sleep(pause_s: float) -> None:
        nonlocal now_s
        now_s += pause_s

    claims = Claims(store.claims, 60, lambda: now_s)
    summary = build_job(store, LengthReward(), claims=claims, patience=IdleTimeout(sleep)).run()
    assert (summary.parts, summary.left, now_s) == (2, 0, 60.0)


def test_judging_waits_for_generation_and_reports_missing_responses(tmp_path: Path) -> None:
    store = RolloutStore.create(tmp_path / "store", "sha256:0", 10)
    store_plan = StorePlan(rounds=2, pieces=2)

    def add_part(name: str, *rows: Rollout) -> None:
        num_unfinished = sum(row.finish_reason == UNFINISHED for row in rows)
        store.add_rollouts(name, rows, store_plan.to_provenance(num_unfinished))

    def run_job(rounds: range | None = None, wait_s: float = 12.0) -> tuple[str, list[float]]:
        pauses_s: list[float] = []
        summary = build_job(store, LengthReward(), rounds=rounds, wait_s=wait_s,
                            patience=IdleTimeout(pauses_s.append)).run()
        return summary.waited_for, pauses_s

    full_wait_s = [5.0, 5.0, 2.0]
    assert run_job() == ("", full_wait_s), "the store has no part, and so no plan of rounds and pieces"
    add_part("round-0001-piece-0000", build_rollout(1, 0, "a"))
    assert run_job() == ("1 of 2 pieces of round 1", full_wait_s)
    assert run_job(wait_s=0) == ("", []), "without waiting, the written responses are judged"
    add_part("round-0001-piece-0001", build_rollout(1, 1, "a", finish_reason=UNFINISHED))
    assert run_job() == ("the ends of responses in 1 of 2 pieces of round 1", full_wait_s)
    add_part("round-0001-piece-0001-attempt-1", build_rollout(1, 1, "ab", attempt=1))
    assert run_job() == ("2 of 2 pieces of round 2", full_wait_s)
    assert run_job(range(1, 2)) == ("", []), "all responses of round 1 are judged"
    add_part("round-0002-piece-0000", build_rollout(2, 2, "a"))
    add_part("round-0002-piece-0001", build_rollout(2, 3, "a"))
    assert run_job() == ("", full_wait_s), "another command may generate more rounds"
    assert run_job(range(1, 4)) == ("2 of 2 pieces of round 3", full_wait_s)
    store_plan = StorePlan(rounds=2, pieces=2, grows=True)
    add_part("round-0002-piece-0002", build_rollout(2, 4, "a"))
    assert run_job(range(1, 3)) == ("", full_wait_s), "a round may need further prompts until it is trained"


def test_judging_warns_about_different_rewards_of_one_version(
        store: RolloutStore, capsys: pytest.CaptureFixture[str]) -> None:
    name = "round-0001-piece-0000"

    class OvertakenReward(LengthReward):
        """A judging job that another job overtakes because it seemed dead."""

        def __call__(self, rows: Sequence[Rollout]) -> list[Result]:
            store.add_rewards("v1", name, [RewardRow(row.key, 0, "v1", 7.0, "scored") for row in rows])
            return super().__call__(rows)

    assert build_job(store, OvertakenReward(), rounds=range(1, 2)).run().parts == 0
    assert "2 of 2 responses have another reward under the same version v1" in capsys.readouterr().err
    assert [row.reward for row in store.read_rewards("v1", name)] == [7.0, 7.0]


def test_rewards_of_an_environment_are_read_from_the_rows(store: RolloutStore) -> None:
    assert resolve_reward_version(ENVIRONMENT, []) == ENVIRONMENT
    with start_judge(ENVIRONMENT, [], 1) as judge:
        result = judge(store.read_rollouts("round-0002-piece-0000")[:1])
        rewards = judge(store.read_rollouts("round-0001-piece-0000"))
    assert (result[0].reward, result[0].status, result[0].components) == (0.5, "scored", {"x": 1})
    assert {(r.reward, r.status) for r in rewards} == {(None, "refused")}


def test_rewards_get_fields_and_messages_of_the_prompt() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert build_record(build_rollout(1, 0, "x", record={"messages": chat, "answer": "2"})) == {
        "messages": chat, "prompt": chat, "answer": "2", "response": "x", "num_tokens": 2,
        "finish_reason": "stop"}
    # The response of an episode is the last turn of the model, not text of tools.
    episode = build_rollout(1, 0, "\\boxed{7} said a tool", outcome={"last_turn": "It is 8."})
    assert build_record(episode)["response"] == "It is 8."
    assert run_reward(Math(), build_record(replace(episode, outcome={}))).status == "refused"


def test_a_built_in_reward_judges_in_processes(store: RolloutStore) -> None:
    version = resolve_reward_version("language", SETTINGS)
    with start_judge("language", SETTINGS, 1) as judge:
        summary = build_job(store, judge, version).run()  # type: ignore[arg-type]
    assert (summary.parts, summary.tally.num_rewards, summary.tally.statuses) == (2, 3, {"scored": 3})
    rewards = [row.reward for row in store.read_rewards(version, "round-0001-piece-0000")]
    assert rewards == [1.0, 0.0] and version != resolve_reward_version("language", ["language=en"])


def test_trl_rewards_get_groups_with_token_ids(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("""
def fewest(prompts, completions, completion_ids, **kwargs):
    assert len(set(prompts)) == 1
    n = [len(ids) for ids in completion_ids]
    return [float(x == min(n)) for x in n]
""")
    store = RolloutStore.create(tmp_path / "store", "sha256:0", 10)
    responses = [(prompt, sample, n) for prompt in range(45) for sample, n in enumerate((3, 2, 4))]
    store.add_rollouts("round-0001-piece-0000", [
        build_rollout(1, prompt, "a", key=Key(f"{prompt:016x}", sample, "p" * 64, "s" * 16),
                      record={"prompt": f"p{prompt}"}, tokens=np.zeros(n, np.int32),
                      logprobs=np.full(n, -1, np.float32), versions=np.zeros(n, np.int32))
        for prompt, sample, n in responses], {})
    with start_judge(f"{tmp_path}/own.py:fewest", [], 2) as judge:
        assert build_job(store, judge).run().tally.statuses == {"scored": 135}
    rewards = {(row.key.prompt, row.key.sample): row.reward
               for row in store.read_rewards("v1", "round-0001-piece-0000")}
    assert rewards == {(f"{prompt:016x}", sample): float(n == 2) for prompt, sample, n in responses}
