"""Publishing a round: documents compared with the rows in the store."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.verify import verify_shards
from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig, RunConfig
from megatron_sov.model.config.run import add_rounds
from megatron_sov.post.rl.publish.publisher import Publisher, read_further_pieces
from megatron_sov.rollouts.prompts import find_unused_rows, read_prompts, write_unused_rows
from megatron_sov.rollouts.round_order import plan_round_pieces, select_round_prompts
from megatron_sov.rollouts.rows import Key, RewardRow, Rollout, format_part_name
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.train.data.rounds import RoundDocuments
from megatron_sov.train.data.sources import open_sources

VERSION = "a" * 64
ROLLOUT = RolloutConfig(rounds=2, prompts_per_round=6, samples_per_prompt=4, steps_per_round=2,
                        piece_prompts=4, max_new_tokens=12, max_prompt_tokens=6)


def build_config(**policy_settings: Any) -> RunConfig:
    policy = PolicyConfig(**{
        "method": "dapo", "max_gen_batches": 1, "overlong_buffer_tokens": 0, **policy_settings})
    base = recipes.get("tiny-solar-open")
    return add_rounds(dataclasses.replace(
        base, rollout=ROLLOUT, policy=policy, model=dataclasses.replace(base.model, vocab_size=368),
        data=dataclasses.replace(base.data, phases=(PhaseConfig("main", seq_len=32),))))


@pytest.fixture
def publisher(packed_data: Any, tmp_path: Path) -> Publisher:
    """A publisher over an empty store and 9 prompts."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "domain": "even" if i % 2 else "odd"}) + "\n"
                            for i in range(9)))
    RolloutStore.create(tmp_path / "store", tokenizer_digest(packed_data.tokenizer), 368)
    return Publisher(
        config=build_config(), rounds=tmp_path / "rounds", store=tmp_path / "store",
        prompts=read_prompts(file), reward_version=VERSION, tokenizer=packed_data.tokenizer)


def write_parts(publisher: Publisher, write_round: Any, number: int = 1, **more: Any) -> RolloutStore:
    store = RolloutStore.open(publisher.store)
    write_round(store, publisher.prompts, ROLLOUT, number, VERSION, **more)
    return store


def write_judged_parts(publisher: Publisher, write_round: Any,
                       judge: Callable[[int, Rollout], RewardRow]) -> None:
    """Write both parts of round 1; `judge` gets the index of a row's group, and the row."""
    store = write_parts(publisher, write_round, judge=False)
    ids = [prompt.id for prompt in select_round_prompts(publisher.prompts, ROLLOUT, 1)]
    for name in (format_part_name(1, 0), format_part_name(1, 1)):
        store.add_rewards(VERSION, name, [judge(ids.index(row.key.prompt), row)
                                          for row in store.read_rollouts(name)])


def test_a_round_holds_the_responses_of_groups_that_learn_step_by_step(publisher: Publisher,
                                                                       write_round: Any) -> None:
    store = write_parts(publisher, write_round)
    assert publisher.publish(1) == ""
    content = read_manifest(publisher.rounds / "0001").content
    # `write_round` scores a response as right if its sample number + 1 divides its prompt's index + 1, so no
    # group has equal rewards.
    assert content["groups"] == {"learns": 6} and content["steps"] == [[0, 12], [12, 12]]
    rows = {row.key[:2]: row for piece in (0, 1) for row in store.read_rollouts(format_part_name(1, piece))}
    expected = [rows[prompt.id, sample] for prompt in select_round_prompts(publisher.prompts, ROLLOUT, 1)
                for sample in range(4)]
    assert verify_shards(publisher.rounds / "0001") == ([], [])
    [source] = open_sources({str(publisher.rounds / "0001"): 1.0}, 368, ("rollouts",))
    documents = source.open_split("train")
    for i, row in enumerate(expected):
        count, begin = len(row.prompt_tokens) + len(row.tokens), len(row.prompt_tokens)
        assert documents.tokens(i, 0, count).tolist() == [*row.prompt_tokens, *row.tokens]
        logprobs = documents.column("behaviour_logprobs", i, 0, count)
        weights = documents.loss_weights(i, 0, count)
        assert logprobs.tolist() == [0.0] * begin + row.logprobs.tolist()
        assert weights.tolist() == [0.0] * begin + [1.0] * len(row.tokens)
        assert documents.types(i, 0, count).tolist() == [1] * begin + [2] * len(row.tokens)
    group_rewards = np.array([1.0, 1.0, 0.0, 0.0])  # of the second prompt: 1 and 2 divide 2
    advantages = [float(documents.column("advantage", 4 + i, len(r.prompt_tokens), 1)[0])
                  for i, r in enumerate(expected[4:8])]
    assert advantages == pytest.approx(
        (group_rewards - 0.5) / (np.std(group_rewards, ddof=1) + 1e-4), rel=1e-6)
    means = content["means"]
    assert means["responses"] == 24 and means["components"] == {"right": 1.0}
    all_rewards = np.array([(i + 1) % (s + 1) == 0 for i in range(6) for s in range(4)])
    assert means["reward"] == pytest.approx(all_rewards.mean())
    assert means["response_tokens"] == pytest.approx(np.mean([len(r.tokens) for r in expected]))
    assert set(means["domains"]) == {"even", "odd"} and means["staleness_steps"] == 0


def test_a_flipped_bit_in_any_file_of_a_round_is_named(publisher: Publisher, write_round: Any,
                                                       tmp_path: Path) -> None:
    write_parts(publisher, write_round)
    assert publisher.publish(1) == ""
    rounds, files = RoundDocuments(publisher.rounds), sorted((publisher.rounds / "0001/rollouts").iterdir())
    assert {f.name.partition(".")[2] for f in files} == {"bin", "idx", "written", "advantage.documents",
                                                         "behaviour_logprobs"}, files
    rounds.verify(1)
    for file in [*files, publisher.rounds / "0001/manifest.json"]:
        content = file.read_bytes()
        for offset in {len(content) // 7, len(content) // 2, len(content) - 2}:
            file.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1:])
            with pytest.raises(UserError, match=file.name):
                rounds.verify(1)
        file.unlink()
        with pytest.raises(UserError, match=file.name):
            rounds.verify(1)
        file.write_bytes(content)
    rounds.verify(1)


def test_only_manifests_remain_of_rounds_that_no_resume_needs(publisher: Publisher, write_round: Any) -> None:
    rollout = dataclasses.replace(ROLLOUT, rounds=5, keep_rounds=1)
    publisher = dataclasses.replace(publisher, config=dataclasses.replace(publisher.config, rollout=rollout))
    rounds = publisher.rounds

    def publish_round(number: int) -> list[int]:
        """Return the published rounds whose files exist at publication."""
        store = RolloutStore.open(publisher.store)
        write_round(store, publisher.prompts, rollout, number, VERSION)
        assert publisher.publish(number) == ""
        (rounds / f"{number:04d}.old_logprobs.f32").write_bytes(b"")
        return [n for n in range(1, number) if (rounds / f"{n:04d}/rollouts").is_dir()]

    def save_checkpoints(*steps: int) -> None:
        shutil.rmtree(rounds.parent / "checkpoints", ignore_errors=True)
        for step in steps:
            with create_artifact(rounds.parent / f"checkpoints/step-{step}", "checkpoint"):
                pass

    # Without a checkpoint, a resumed run would start again from round 1.
    assert [publish_round(1), publish_round(2), publish_round(3)] == [[], [1], [1, 2]]
    # each round has 2 steps: a run that resumes from step 3 needs round 2, with steps 3 and 4
    save_checkpoints(3, 6)
    assert publish_round(4) == [2, 3] and read_manifest(rounds / "0001").content["round"] == 1
    assert [file.name for file in sorted(rounds.glob("*.f32"))] == [
        f"000{n}.old_logprobs.f32" for n in (2, 3, 4)]
    save_checkpoints(8)
    shutil.rmtree(publisher.store / "rollouts" / format_part_name(2, 1))
    assert publish_round(5) == [2, 4], "round 2 could not be published again: the store has lost a part"
    with pytest.raises(UserError, match=r"missing; delete .*0003"):
        RoundDocuments(rounds).verify(3)
    shutil.rmtree(rounds / "0003")
    assert publisher.publish(3) == ""


def test_missing_parts_of_a_round_are_described(publisher: Publisher, write_round: Any,
                                                tmp_path: Path) -> None:
    without_store = dataclasses.replace(publisher, store=tmp_path / "no store")
    assert without_store.publish(1) == f"no job has written to {tmp_path / 'no store'} yet"
    without_store.store.mkdir()
    assert without_store.publish(1) == f"no job has written to {tmp_path / 'no store'} yet"
    assert publisher.publish(1) == "2 of 2 pieces are not written yet, the first is 0"
    write_parts(publisher, write_round, judge=False)
    assert publisher.publish(1) == ("2 of 2 parts are not judged yet by reward version aaaaaaaaaaaa, the "
                                    "first is round-0001-piece-0000")
    assert not publisher.rounds.exists()
    write_parts(publisher, write_round, 2)
    assert publisher.publish(2) == "", "rounds can be published in any order"
    assert not (publisher.rounds / "0001").exists()


def test_unfinished_responses_are_waited_for(publisher: Publisher, write_round: Any) -> None:
    unfinished = [(1, 0), (1, 3), (4, 2)]
    write_parts(publisher, write_round, unfinished=unfinished)
    assert publisher.publish(1) == "2 of 6 groups wait for responses that are not finished"
    write_parts(publisher, write_round, attempt=1, unfinished=unfinished)
    assert publisher.publish(1) == ""
    content = read_manifest(publisher.rounds / "0001").content
    assert content["steps"] == [[0, 12], [12, 12]]
    assert [part["name"] for part in content["store"]] == [
        format_part_name(1, 0), format_part_name(1, 0, 1), format_part_name(1, 1), format_part_name(1, 1, 1)]


def test_publishing_does_not_wait_for_invalid_continuations(publisher: Publisher, write_round: Any) -> None:
    store = write_parts(publisher, write_round, unfinished=[(1, 0)])
    [row] = [row for row in store.read_rollouts(format_part_name(1, 0)) if row.finish_reason == "unfinished"]
    invalid_row = dataclasses.replace(row, attempt=1, finish_reason="stop",
                                      logprobs=np.full(len(row.tokens), np.nan, np.float32))
    store.add_rollouts(format_part_name(1, 0, 1), [invalid_row], {})
    store.add_rewards(VERSION, format_part_name(1, 0, 1), [])
    assert publisher.publish(1) == "", "no job would write the invalid response again"
    content = read_manifest(publisher.rounds / "0001").content
    assert content["unjudged"] == {"kept_out": 1}
    assert content["steps"] == [[0, 11], [11, 12]]  # 3 groups x 4 responses a step, one invalid


def test_publishing_warns_about_responses_of_other_runs(publisher: Publisher, write_round: Any,
                                                        tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(publisher, write_round, 1)
    write_parts(publisher, write_round, 2)  # by the policy of step 2, which is none of the run's policies
    publisher = dataclasses.replace(publisher, is_own=lambda step, sha256: not step)
    assert publisher.publish(1) == "" and capsys.readouterr().err == ""
    assert publisher.publish(2) == ""
    errors = capsys.readouterr().err
    assert f"of step 2 began responses of round 2 and does not belong to {tmp_path}" in errors


def test_excluded_groups_are_counted_by_reason_and_a_step_may_be_empty(publisher: Publisher,
                                                                       write_round: Any) -> None:
    rewards = {0: [1, 1, 1, 1], 1: [0, 0, 0, 0], 2: [None, None, None, 1],  # first step: no group learns
               3: [1, 0, None, 0], 4: [0, 0, 1, 0], 5: [1, 1, 1, 0]}

    def judge(group: int, row: Rollout) -> RewardRow:
        reward = rewards[group][row.key.sample]
        return RewardRow(row.key, 0, VERSION, reward, "scored" if reward is not None else "failed")

    write_judged_parts(publisher, write_round, judge)
    assert publisher.publish(1) == ""
    content = read_manifest(publisher.rounds / "0001").content
    assert content["groups"] == {"all_right": 1, "all_wrong": 1, "too_few": 1, "learns": 3}
    # None of the groups 0 to 2 learns; of those of step 2, one response has no reward.
    assert content["unjudged"] == {"failed": 4} and content["steps"] == [[0, 0], [0, 11]]
    rounds = RoundDocuments(publisher.rounds, 368)
    assert [len(step) for step in rounds.read(1, 32, 2).steps] == [0, 11]


LEARNING = [
    # settings of the policy, and the resulting number of groups of each kind
    ({"method": "grpo"}, {"no_advantage": 3, "learns": 3}),
    ({"method": "ink_grpo"}, {"no_advantage": 3, "learns": 3}),
    ({"method": "grpo", "all_wrong": "drop"}, {"all_wrong": 2, "no_advantage": 1, "learns": 3}),
    ({"method": "grpo", "all_wrong_reward": -0.5}, {"no_advantage": 1, "learns": 5}),
    ({"method": "grpo", "overlong_buffer_tokens": 12}, {"learns": 6}),
    ({"method": "opd"}, {"learns": 6}),
    ({"method": "grpo", "opd_coeff": 0.5}, {"learns": 6})]


@pytest.mark.parametrize(("policy_settings", "groups"), LEARNING)
def test_groups_that_learn_have_advantages(policy_settings: dict[str, Any], groups: dict[str, int],
                                           publisher: Publisher, write_round: Any) -> None:
    """A regression counted groups with equal rewards as learning: 100 % for 64 correct responses of 64."""
    publisher.config = build_config(**{"overlong_buffer_tokens": 0, **policy_settings})
    rewards = [[1, 1, 1, 1], [0.1] * 4, [0, 0, 0, 0], [1, 0, 0, 0], [0.2, 0.1, 0, 0], [1, 1, 1, 0.9]]
    write_judged_parts(publisher, write_round, lambda group, row: RewardRow(
        row.key, 0, VERSION, rewards[group][row.key.sample], "scored"))
    assert publisher.publish(1) == ""
    content = read_manifest(publisher.rounds / "0001").content
    assert content["groups"] == groups
    assert content["means"]["pass_rate"] == pytest.approx(8 / 24)  # 4 + 1 + 3 rewards are 1
    # Groups without advantages stay in the step: the loss is a mean over all its responses.
    assert sum(count for _, count in content["steps"]) == 4 * (6 - groups.get("all_wrong", 0))


ALL_PIECES = 99  # more than any round here has


def write_pieces(publisher: Publisher, rewards: Any, first: int, end: int, number: int = 1) -> None:
    """Write and score pieces `first` to `end` of a round; `rewards(i)` are the rewards of group i."""
    store = RolloutStore.open(publisher.store)
    pieces = plan_round_pieces(publisher.prompts, ROLLOUT, number, ALL_PIECES)
    group_of_prompt = {prompt.id: i for i, prompt in enumerate(p for piece in pieces for p in piece.prompts)}
    for piece in pieces[first:end]:
        rows = [Rollout(
            Key(prompt.id, sample, "0" * 64, "sampling"), number, 0, prompt.record,
            np.arange(3, dtype=np.int32), np.full(4 + sample, group_of_prompt[prompt.id], np.int32),
            np.full(4 + sample, -1.0, np.float32), np.zeros(4 + sample, np.int32),
            "length" if sample == 3 else "stop", "text", 1.0, "scripted", 0.0, 1.0)
                for prompt in piece.prompts for sample in range(4)]
        store.add_rollouts(piece.part(), rows, {})
        store.add_rewards(VERSION, piece.part(), [
            RewardRow(row.key, 0, VERSION, float(rewards(group_of_prompt[row.key.prompt])[row.key.sample]),
                      "scored")
            for row in rows])


def test_preferences_pair_the_best_with_the_worst_response_unless_their_tokens_are_equal(
        publisher: Publisher) -> None:
    policy = PolicyConfig("preference", max_gen_batches=1)
    publisher.config = dataclasses.replace(build_config(), policy=policy)
    # `write_pieces` makes responses of 4, 5, 6 and 7 tokens, all with the same id.
    write_pieces(publisher, lambda group: [0, 1, 0.5, 0], 0, 2)
    assert publisher.publish(1) == ""
    assert read_manifest(publisher.rounds / "0001").content["groups"] == {"learns": 6}


@pytest.fixture
def filling_publisher(publisher: Publisher, tmp_path: Path) -> Publisher:
    """A publisher of 40 prompts that requests further prompts for groups without advantages."""
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(40)))
    return dataclasses.replace(publisher, prompts=read_prompts(file), config=build_config(max_gen_batches=4))


def list_learned_groups(publisher: Publisher, number: int = 1) -> list[list[int]]:
    """Return the indices of the groups that each step of a round trains on.

    `write_pieces` gives responses, after prompts of 3 tokens, the index of their group as token id.
    """
    rounds = RoundDocuments(publisher.rounds, 368)
    opened = rounds.read(number, 32, 2)
    rounds.open(number, opened)
    return [sorted({int(rounds.tokens((number << 32) + document, 3, 1)[0]) for document in step})
            for step in opened.steps]


def test_groups_that_do_not_learn_are_replaced_until_the_round_is_full(filling_publisher: Publisher,
                                                                       tmp_path: Path) -> None:
    def score_even(group: int) -> list[int]:
        """Give groups with an even index different rewards, the others four equal ones: 1, 0, 1, 0, ..."""
        return [1, 0, 0, 0] if group % 2 == 0 else [group % 4 == 1] * 4

    assert filling_publisher.publish(1) == "2 of 2 pieces are not written yet, the first is 0"
    write_pieces(filling_publisher, score_even, 0, 2)
    message = "3 of 6 groups of round 1 learn, and the round needs 6: 8 further prompts are requested"
    assert filling_publisher.publish(1) == message and read_further_pieces(filling_publisher.rounds, 1) == 2
    for _ in range(2):  # a resumed run continues the same requests
        assert filling_publisher.publish(1) == "2 of 4 pieces are not written yet, the first is 2"
    write_pieces(filling_publisher, score_even, 2, 4)
    assert filling_publisher.publish(1) == ""
    content = read_manifest(filling_publisher.rounds / "0001").content
    # Of the 6 planned groups and 8 further ones, 7 have an even index.
    assert content["groups"] == {"all_right": 4, "all_wrong": 3, "surplus": 1, "learns": 6}
    assert list_learned_groups(filling_publisher) == [[0, 2, 4], [6, 8, 10]]
    assert content["means"]["responses"] == 56  # 14 groups of 4
    # Another run on the same store, which requests no further prompts, trains only on the planned groups.
    without_replacement = dataclasses.replace(filling_publisher, rounds=tmp_path / "alone",
                                              config=build_config())
    assert without_replacement.publish(1) == "" and list_learned_groups(without_replacement) == [[0, 2], [4]]


def test_a_round_without_further_prompts_trains_on_learning_groups(
        filling_publisher: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def score_rare(group: int) -> list[int]:
        return [group == 3, 0, 0, 0]

    write_pieces(filling_publisher, score_rare, 0, ALL_PIECES)
    for num_groups in (6, 6 + 8, 6 + 8 + 8):
        assert filling_publisher.publish(1) == (f"1 of {num_groups} groups of round 1 learn, and the round "
                                                "needs 6: 8 further prompts are requested")
    assert filling_publisher.publish(1) == ""
    assert ("1 of 30 groups of round 1 learn, and the round needs 6; policy.max_gen_batches = 4: the run "
            "trains on these groups") in capsys.readouterr().err
    assert list_learned_groups(filling_publisher) == [[], [3]]
    with_few_prompts = dataclasses.replace(filling_publisher, prompts=filling_publisher.prompts[:9],
                                           rounds=tmp_path / "few", store=tmp_path / "other")
    RolloutStore.create(with_few_prompts.store, RolloutStore.open(filling_publisher.store).tokenizer_digest,
                        368)
    write_pieces(with_few_prompts, score_rare, 0, 99)
    assert "3 further prompts" in with_few_prompts.publish(1) and with_few_prompts.publish(1) == ""
    assert "1 of 9 groups of round 1 learn, and the round needs 6; no prompts are left" in (
        capsys.readouterr().err)


def test_prompts_that_the_store_sets_aside_are_in_no_round(publisher: Publisher, write_round: Any,
                                                           tmp_path: Path) -> None:
    store = RolloutStore.open(publisher.store)
    long_prompt, other_prompts = publisher.prompts[0], publisher.prompts[1:]
    write_unused_rows(store.path, find_unused_rows(publisher.prompts, {long_prompt.id: 9}, 6))
    write_round(store, other_prompts, ROLLOUT, 1, VERSION)
    assert publisher.publish(1) == ""
    (store.path / "set_aside.json").unlink()
    without_list = dataclasses.replace(publisher, rounds=tmp_path / "without list")
    with pytest.raises(UserError, match="not in piece 0"):
        without_list.publish(1)


@pytest.mark.parametrize(("status", "reason", "message"), [
    ("failed", "no server answers", r"reward \(24 failed"),
    ("refused", "has no 'answer'", r"another --run and --store$")])
def test_a_round_without_any_reward_is_an_error(status: str, reason: str, message: str,
                                                publisher: Publisher, write_round: Any) -> None:
    write_judged_parts(publisher, write_round,
                       lambda group, row: RewardRow(row.key, 0, VERSION, None, status, {}, reason))
    with pytest.raises(UserError, match=message):
        publisher.publish(1)
    assert not publisher.rounds.exists()


def test_resume_rejects_other_prompts_and_warns_about_another_reward(
        publisher: Publisher, write_round: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_parts(publisher, write_round)
    assert publisher.publish(1) == ""
    resumed = dataclasses.replace(publisher)
    assert "pieces are not written" in resumed.publish(2) and not capsys.readouterr().err
    reordered = dataclasses.replace(publisher, prompts=publisher.prompts.select(np.arange(9)[::-1]))
    with pytest.raises(UserError, match="rounds/0001: was made"):
        reordered.publish(2)
    write_round(store, publisher.prompts, ROLLOUT, 2, "b" * 64)
    assert dataclasses.replace(publisher, reward_version="b" * 64).publish(2) == ""
    assert "judged by reward version aaaaaaaaaaaa, and round 2 will be by bbbb" in capsys.readouterr().err


def test_resume_rejects_other_sampling_settings(publisher: Publisher, write_round: Any,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    store, chat = write_parts(publisher, write_round), {"chat_template.jinja": "sha256:1"}
    sampling = {"plain": False, "chat": chat, "environment": "1", "limits": {"max_turns": 5}}
    assert dataclasses.replace(publisher, chosen_by=sampling).publish(1) == ""
    for change, message in [({"limits": {"max_turns": 7}},
                             "limits.max_turns = 5, and .* with 7; resume with"),
                            ({"chat": {"chat_template.jinja": "sha256:2"}},
                             "chat.chat_template.jinja = sha256:1, and .* with sha256:2"),
                            ({"chat": {}}, "chat.chat_template.jinja = sha256:1, and .* with None")]:
        with pytest.raises(UserError, match=f"rounds/0001: was generated with {message}"):
            dataclasses.replace(publisher, chosen_by=sampling | change).publish(2)
    # A run without `chosen_by`, which trains on rounds of other runs, accepts any sampling settings.
    assert "pieces are not written" in dataclasses.replace(publisher).publish(2)
    assert not capsys.readouterr().err
    write_round(store, publisher.prompts, ROLLOUT, 2, VERSION)
    assert dataclasses.replace(publisher, chosen_by=sampling | {"environment": "2"}).publish(2) == ""
    assert "environment = 1, and the next round would be with 2: the code" in capsys.readouterr().err


def test_published_routes_match_replayed_tokens(publisher: Publisher, write_round: Any,
                                                tmp_path: Path) -> None:
    model = dataclasses.replace(publisher.config.model, num_experts=8, num_experts_per_token=2)
    replay_config = dataclasses.replace(publisher.config, model=model,
                                        policy=PolicyConfig(method="dapo", router_replay=True))
    replay_publisher = dataclasses.replace(publisher, rounds=tmp_path / "replayed", config=replay_config)
    store = write_parts(publisher, write_round)
    with pytest.raises(UserError, match="round 1: sample 0"):
        replay_publisher.publish(1)
    routed_store = RolloutStore.create(tmp_path / "routed", store.tokenizer_digest, 368)
    layers = model.num_moe_layers()
    for name in (format_part_name(1, 0), format_part_name(1, 1)):
        rows = []
        for row in store.read_rollouts(name):
            experts = np.arange(2, dtype=np.uint8) + row.key.sample
            num_routed = len(row.prompt_tokens) + len(row.tokens) - 1  # the last token is never read
            rows.append(dataclasses.replace(row, routes=np.tile(experts, (num_routed, layers, 1))))
        routed_store.add_rollouts(name, rows, {})
        routed_store.add_rewards(VERSION, name, store.read_rewards(VERSION, name))
    assert dataclasses.replace(replay_publisher, store=routed_store.path).publish(1) == ""
    assert verify_shards(tmp_path / "replayed/0001") == ([], [])
    rounds = RoundDocuments(tmp_path / "replayed", 368)
    rounds.open(1, rounds.read(1, 32, 2))
    document = (1 << 32) + 2  # sample 2 of the first prompt
    length = rounds.lengths[document]
    assert rounds.routes(document, 0, length - 1).tolist() == [[[2, 3]] * layers] * (length - 1)
    assert (rounds.routes(document, length - 1, 1) == 255).all()  # 255: not recorded


def test_publishing_rejects_foreign_stores(publisher: Publisher, write_round: Any, tmp_path: Path) -> None:
    write_parts(publisher, write_round)
    fewer_prompts = dataclasses.replace(publisher, prompts=publisher.prompts[:-1])
    with pytest.raises(UserError, match="round 1 holds responses"):
        fewer_prompts.publish(1)
    RolloutStore.create(tmp_path / "other", "sha256:0", 368)
    with pytest.raises(UserError, match=r"another tokenizer \(sha256:0\)"):
        dataclasses.replace(publisher, store=tmp_path / "other").publish(1)
    data = dataclasses.replace(publisher.config.data, phases=(PhaseConfig("round-0001", seq_len=12),))
    short_rows = dataclasses.replace(publisher, config=dataclasses.replace(publisher.config, data=data))
    with pytest.raises(UserError, match=r"1\d tokens"):
        short_rows.publish(1)
    rollout = dataclasses.replace(ROLLOUT, temperature=0.7)
    other_config = dataclasses.replace(publisher.config, rollout=rollout)
    other_temperature = dataclasses.replace(publisher, config=other_config)
    with pytest.raises(UserError, match=r"1, and rollout.temperature"):
        other_temperature.publish(1)
    assert not publisher.rounds.exists() or not any(publisher.rounds.iterdir())
    assert publisher.publish(1) == ""
    rounds = RoundDocuments(publisher.rounds, 368)
    with pytest.raises(UserError, match="round 1 with 2"):
        rounds.read(1, 32, 3)
    with pytest.raises(UserError, match=r"more than data.phases.0.seq_len = 10"):
        rounds.read(1, 10, 2)
