"""Loss masks of a round of episodes, from the store to packed rows: tokens of tools have weight 0."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov import recipes
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig
from megatron_sov.model.config.run import add_rounds
from megatron_sov.post.rl.publish.publisher import Publisher
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.round_order import select_round_prompts, split_into_pieces
from megatron_sov.rollouts.rows import NOT_WRITTEN, Key, RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rounds import RoundDocuments
from megatron_sov.train.data.rows import build_row
from megatron_sov.train.data.streams import PackedSegment

VERSION, MAX_TOKENS, OVERLONG_BUFFER = "a" * 64, 12, 4
ROLLOUT = RolloutConfig(rounds=1, prompts_per_round=6, samples_per_prompt=4, piece_prompts=4,
                        max_new_tokens=MAX_TOKENS, max_prompt_tokens=6)
ScoredRollout = tuple[Rollout, float]


def write_round(store: RolloutStore, prompts: Any, random: np.random.Generator) -> list[list[ScoredRollout]]:
    """Write and score a round of random episodes, in which tools wrote some of the tokens; return its
    groups."""
    groups = []
    for piece in split_into_pieces(select_round_prompts(prompts, ROLLOUT, 1), 1, ROLLOUT.piece_prompts):
        rows = []
        for prompt in piece.prompts:
            for sample in range(ROLLOUT.samples_per_prompt):
                count = int(random.integers(1, MAX_TOKENS + 1))
                is_written = random.random(count) < 0.6
                is_written[0] = True
                rows.append(Rollout(
                    Key(prompt.id, sample, "f" * 64, "s"), 1, 0, prompt.record,
                    random.integers(0, 368, 3 + sample).astype(np.int32),
                    random.integers(0, 368, count).astype(np.int32),
                    np.where(is_written, -random.random(count), 0).astype(np.float32),
                    np.where(is_written, 0, NOT_WRITTEN).astype(np.int32),
                    str(random.choice(["answered", "turns", "tokens"])), "", 1.0, "scripted", 0.0, 1.0))
        rewards = random.integers(0, 3, len(rows)) / 2
        store.add_rollouts(piece.part(), rows, {})
        store.add_rewards(VERSION, piece.part(), [RewardRow(row.key, 0, VERSION, float(reward), "scored")
                                                  for row, reward in zip(rows, rewards, strict=True)])
        scored = list(zip(rows, rewards.tolist(), strict=True))
        groups += [scored[i:i + 4] for i in range(0, len(scored), 4)]
    return groups


def compute_expected(groups: list[list[ScoredRollout]]) -> list[ScoredRollout]:
    """Return the rollouts to train on with their advantages, by the formulas of the DAPO paper."""
    expected = []
    for group in groups:
        rewards = np.array([reward for _, reward in group])
        if rewards.min() == rewards.max():
            continue
        lengths = np.array([(row.versions != NOT_WRITTEN).sum() for row, _ in group])
        penalized = rewards - np.clip((lengths - (MAX_TOKENS - OVERLONG_BUFFER)) / OVERLONG_BUFFER, 0, 1)
        values = (penalized - penalized.mean()) / (penalized.std(ddof=1) + 1e-4)
        expected += [(row, value) for (row, _), value in zip(group, values.tolist(), strict=True)
                     if row.finish_reason != "tokens"]
    return expected


def test_labels_are_exactly_the_policys_tokens(packed_data: Any, tmp_path: Path) -> None:
    tasks = [json.dumps({"question": str(i)}) + "\n" for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(tasks))
    prompts, base = read_prompts(tmp_path / "prompts.jsonl"), recipes.get("tiny-solar-open")
    store = RolloutStore.create(tmp_path / "store", tokenizer_digest(packed_data.tokenizer), 368)
    expected = compute_expected(write_round(store, prompts, np.random.default_rng(5)))
    policy = PolicyConfig(method="dapo", max_gen_batches=1, overlong_buffer_tokens=OVERLONG_BUFFER,
                          mask_truncated=True)
    config = add_rounds(dataclasses.replace(
        base, rollout=ROLLOUT, policy=policy, model=dataclasses.replace(base.model, vocab_size=368),
        data=dataclasses.replace(base.data, phases=(PhaseConfig("main", seq_len=32),))))
    publisher = Publisher(config=config, rounds=tmp_path / "rounds", store=store.path, prompts=prompts,
                          reward_version=VERSION, tokenizer=packed_data.tokenizer)
    assert publisher.publish(1) == ""
    rounds = RoundDocuments(tmp_path / "rounds", 368)
    opened = rounds.read(1, 32, 1)
    rounds.open(1, opened)
    assert [len(step) for step in opened.steps] == [len(expected)] and len(expected) > 9
    for i, (row, advantage) in enumerate(expected):
        ids, begin = [*row.prompt_tokens, *row.tokens], len(row.prompt_tokens)
        result = build_row(OrderedSample(0, (PackedSegment((1 << 32) + i, 0, len(ids)),)), rounds, 32, 0,
                           ("behaviour_logprobs", "advantage"))
        # The label of position t is token t + 1.
        is_written = np.array([t + 1 >= begin and row.versions[t + 1 - begin] != NOT_WRITTEN
                               for t in range(len(ids) - 1)] + [False] * (33 - len(ids)))
        assert result.labels[:len(ids) - 1].tolist() == ids[1:]
        assert result.weights.tolist() == is_written.tolist() and set(result.types[is_written]) == {2}
        logprobs = result.columns["behaviour_logprobs"]
        assert logprobs[is_written].tolist() == row.logprobs[row.is_written].tolist()
        assert not logprobs[~is_written].any()
        np.testing.assert_allclose(result.columns["advantage"][is_written], advantage, rtol=1e-6)
