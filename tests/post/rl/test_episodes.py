"""Episodes as rows: deadlines and later policies change only the versions of tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.judge.tools.episode import ENDS, GeneratedTurn
from megatron_sov.judge.tools.playing import EpisodeSettings
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate.episodes import Episodes
from megatron_sov.post.rl.generate.pieces import SampleAttempt
from megatron_sov.rollouts.prompts import PromptList, RolloutPrompt
from megatron_sov.rollouts.round_order import PromptPiece
from megatron_sov.rollouts.rows import NOT_WRITTEN, UNFINISHED, Rollout, select_last_attempts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from tests.judge.tools.fuzzed_episodes import LIMITS, FuzzedPolicy, build_small_encoder

ROLLOUT = RolloutConfig(prompts_per_round=2, samples_per_prompt=2, deadline_s=2.0)


class TimedPolicy:
    """A policy for which each round of turns takes a second."""

    def __init__(self, policy: FuzzedPolicy) -> None:
        self._policy, self.now_s = policy, 0.0

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        self.now_s += 1
        # Engines return log-probabilities above 0 by rounding errors, and the store rejects them.
        return [replace(turn, logprobs=[1e-7, *turn.logprobs[1:]])
                for turn in self._policy.sample(prompts, max_new_tokens, streams)]


def test_an_episode_continues_after_a_deadline(tmp_path: Path) -> None:
    chat = build_small_encoder()
    encoder = TurnEncoder(chat, "the test's tokenizer")
    request = request_environment("files", {})
    environment: Any = build_versioned_environment(request)[0]
    piece = PromptPiece(1, 0, PromptList.from_prompts(
        RolloutPrompt(f"{n:016x}", environment.EXAMPLES[n]) for n in range(2)))
    timed_policy = TimedPolicy(FuzzedPolicy("files", chat, encoder.end_ids[0]))
    source = Episodes(
        table=EpisodeSettings(request, encoder, LIMITS, 3), version="v1", decode=lambda ids: chat.decode(ids),
        end_ids=encoder.end_ids, rollout=ROLLOUT, engine_name="script", chosen_by={"environment": "v1"},
        clock_s=lambda: timed_policy.now_s)
    store = RolloutStore.create(tmp_path / "store", "sha256:0", encoder.end_ids[0] + 1)
    rows: list[Rollout] = []
    attempt, unfinished = 0, ()
    while attempt == 0 or unfinished:
        policy = Policy(tmp_path, 4 * attempt, f"{attempt:064x}")
        name = piece.part(attempt)
        [written_rows] = source.play_attempts(timed_policy,
                                              [SampleAttempt(piece, attempt, policy, unfinished)])
        store.add_rollouts(name, written_rows, {})
        stored_rows = store.read_rollouts(name)
        assert all(row.attempt == attempt for row in stored_rows)
        rows += stored_rows
        unfinished = tuple(row for row in stored_rows if row.finish_reason == UNFINISHED)
        attempt += 1
    assert attempt > 2, "nothing was cut off twice"
    [uninterrupted] = replace(source, rollout=replace(ROLLOUT, deadline_s=0.0)).play_attempts(
        timed_policy, [SampleAttempt(piece, 0, Policy(tmp_path, 0, "0" * 64))])
    completed = {row.key: row for row in select_last_attempts(rows)}
    assert len(completed) == 4 == len(uninterrupted)
    for expected in uninterrupted:
        row = completed[expected.key]
        assert row.tokens.tolist() == expected.tokens.tolist() and row.response == expected.response
        assert np.array_equal(row.logprobs, expected.logprobs) and row.spans == expected.spans
        assert (row.finish_reason, row.outcome) == (expected.finish_reason, expected.outcome)
        assert row.finish_reason in ENDS and row.outcome["reward_version"] == "v1"
        assert row.record == expected.record
        first, last = row.spans[-1]
        assert row.outcome["last_turn"] == encoder.text(row.tokens[first:last].tolist())
        versions = row.versions[row.versions != NOT_WRITTEN]
        assert (np.diff(versions) >= 0).all() and set(versions) <= {4 * n for n in range(attempt)}
        assert not row.logprobs[row.versions == NOT_WRITTEN].any()
    assert any(len(set(row.versions) - {NOT_WRITTEN}) > 1 for row in completed.values())
