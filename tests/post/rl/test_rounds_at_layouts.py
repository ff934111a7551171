"""Published rounds give equal steps at every layout and micro-batch size."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import (
    ParallelConfig, PhaseConfig, PolicyConfig, RolloutConfig, RunConfig, apply_settings)
from megatron_sov.model.config.post_training import PolicyMethod
from megatron_sov.model.config.run import add_rounds
from megatron_sov.post.policy import build_policy_objective
from megatron_sov.post.preference import build_round_objective
from megatron_sov.post.rl.logprob_columns import select_columns
from megatron_sov.post.rl.publish import shards
from megatron_sov.post.rl.publish.publisher import Publisher, list_number_columns
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.run import RolloutCycle
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.rows import RewardRow
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.rounds import Policy, RunPolicies
from megatron_sov.train.data.rounds import BEHAVIOUR, RoundDocuments, build_rounds_source
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer, TrainerOptions
from megatron_sov.work.processes.stop_signals import StopFlag

SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
            "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4", "model.dense_ffn_dim=48",
            "model.sliding_window_tokens=8", "train.micro_batch_size=2", "train.global_batch_size=8",
            "train.head_chunk_tokens=24", "train.precision=fp64", "optim.warmup_steps=1",
            "objective.name=policy", "policy.method=dapo", 'data.phases=[{"name": "main", "seq_len": 32}]')
VERSION = "a" * 64
ROLLOUT = RolloutConfig(rounds=2, prompts_per_round=4, samples_per_prompt=4, steps_per_round=2,
                        piece_prompts=2, max_new_tokens=12, max_prompt_tokens=6)
ROUNDS = [f"rollout.{name}={json.dumps(value)}" for name, value in dataclasses.asdict(ROLLOUT).items()]
Layout = tuple[int, list[str]]


def build_config(settings: list[str]) -> RunConfig:
    """Return settings of a model of some thousand parameters."""
    return add_rounds(apply_settings(recipes.get("tiny-k-exaone"), [*SETTINGS, *settings]))


def train_rounds(settings: list[str], folder: str) -> list[dict[str, Any]]:
    """Train the rounds that are published in FOLDER/rounds; return each step's numbers."""
    config = build_config(settings)
    parallel_world = world.join_world(config.parallel)
    config.check(parallel_world.size)
    objective = (build_round_objective if config.policy.learns_preferences
                 else build_policy_objective)(config)
    # A run stores its log-probabilities next to the rounds, so each layout has a copy of them.
    columns = select_columns(config, objective.columns, Path(folder))
    rounds = RoundDocuments(Path(folder) / "rounds", config.model.vocab_size, columns.names,
                            published=(BEHAVIOUR, *list_number_columns(config)))
    source = build_rounds_source(rounds, None, columns.routes)
    policies = RunPolicies(Path(folder), Policy(Path(folder), 0, "start"), config.rollout, {})
    publisher: Any = SimpleNamespace(publish=lambda number: "")
    loader = RoundLoader(documents=rounds, rollout=config.rollout, columns=columns)
    feed = RolloutCycle(rollout=config.rollout, policies=policies, rollouts=None, publisher=publisher,
                        loader=loader)
    trainer = Trainer(config, parallel_world, RunFolder(Path("not-written")), [source], objective,
                      TrainerOptions(feed=feed))
    stop, steps = StopFlag(), []
    while not trainer.finished:
        assert trainer.fetch_data(stop) is None
        result = train_step(trainer)
        if result is None:
            steps.append({"skipped": 1.0})
            continue
        steps.append({"loss": result.loss, "grad_norm": result.grad_norm, "tokens": result.num_tokens,
                      **{f"term {name}": value for name, value in result.losses.items()},
                      "load": trainer.expert_load.gather().tolist(),
                      # meters of the round exist on the first rank only
                      **{f"meter {name}": value for name, value in result.meters.items()
                         if name not in feed.meters}})
    return steps


def publish(settings: list[str], rounds: str, store: str, prompts: str, tokenizer: str, version: str) -> str:
    """Publish the first round, one piece per shard; return its missing parts."""
    config = build_config(settings)
    world.join_world(ParallelConfig())
    shards.SHARD_TOKENS = 1
    return Publisher(config=config, rounds=Path(rounds), store=Path(store), tokenizer=Path(tokenizer),
                     prompts=read_prompts(Path(prompts)), reward_version=version).publish(1)


def publish_rounds(folder: Path, packed_data: Any, write_round: Any, policy: PolicyConfig, *, seq_len: int,
                   rewards: Sequence[float] = (), **more: bool) -> None:
    """Write and publish two rounds. With `rewards`, responses to a round's n-th prompt have the n-th reward,
    except for one response per prompt in round 2."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(6)))
    prompts, digest = read_prompts(file), tokenizer_digest(packed_data.tokenizer)
    store = RolloutStore.create(folder / "store", digest, 368)
    base = recipes.get("tiny-k-exaone")
    config = add_rounds(dataclasses.replace(
        base, rollout=ROLLOUT, policy=policy, model=dataclasses.replace(base.model, vocab_size=368),
        data=dataclasses.replace(base.data, phases=(PhaseConfig("main", seq_len=seq_len),))))
    publisher = Publisher(config=config, rounds=folder / "rounds", store=store.path, prompts=prompts,
                          reward_version=VERSION, tokenizer=packed_data.tokenizer)
    for number in (1, 2):
        write_round(store, prompts, ROLLOUT, number, VERSION, judge=not rewards, **more)
        prompt_ids = [prompt.id for prompt in select_round_prompts(prompts, ROLLOUT, number)]
        for part in store.parts(number) if rewards else ():
            rows = []
            for row in store.read_rollouts(part.name):
                # In round 2, the first sample of each group gets reward 0.
                is_zero = number == 2 and row.key.sample == 0
                reward = 0.0 if is_zero else rewards[prompt_ids.index(row.key.prompt)]
                rows.append(RewardRow(row.key, 0, VERSION, reward, "scored"))
            store.add_rewards(VERSION, part.name, rows)
        assert publisher.publish(number) == ""


def train_at_layouts(ranks: Any, job: Any, folder: Path, layouts: dict[str, Layout], settings: list[str]
                     ) -> list[dict[str, Any]]:
    """Train the rounds at each layout, check that all take equal steps, and return the steps."""
    jobs = []
    for i, (nproc, layout) in enumerate(layouts.values()):
        copy = folder / settings[-1] / str(i)
        shutil.copytree(folder / "rounds", copy / "rounds")
        jobs.append(job(__file__, "train_rounds", nproc,
                        {"settings": [*ROUNDS, *settings, *layout], "folder": str(copy)}))
    reference: list[dict[str, Any]]
    (reference,), *results = ranks(*jobs)
    for name, steps_by_rank in zip(list(layouts)[1:], results, strict=True):
        for steps in steps_by_rank:
            for number, (step, expected) in enumerate(zip(steps, reference, strict=True), 1):
                for key, value in expected.items():
                    # The trainer stores log-probability columns in float32.
                    assert np.allclose(step[key], value, rtol=1e-6, atol=1e-8), f"{name}: {number}: {key}"
    return reference


POLICY_LOSS_ONLY = ["model.seq_aux_loss_coeff=0", "model.router_bias_update_rate=0", "model.num_mtp_layers=0"]


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("settings", "is_computed"), [
    (POLICY_LOSS_ONLY, [False, False, True, True]),
    (POLICY_LOSS_ONLY[:2], [True] * 4), (POLICY_LOSS_ONLY[1:], [True] * 4)])
def test_steps_without_advantages_are_skipped_at_every_number_of_processes(
        settings: list[str], is_computed: list[bool], ranks: Any, job: Any, packed_data: Any,
        write_round: Any, tmp_path: Path) -> None:
    """All rewards of a group of round 1 are equal; in round 2 one differs."""
    publish_rounds(tmp_path, packed_data, write_round, PolicyConfig(method="grpo"), seq_len=32,
                   rewards=[0.1, 1.0, 0.7, 0.3])
    layouts: dict[str, Layout] = {"one rank": (1, []), "DP2": (2, [])}
    steps = train_at_layouts(ranks, job, tmp_path, layouts,
                             ["policy.method=grpo", *settings, "rollout.seed=0"])
    assert ["skipped" not in step for step in steps] == is_computed
    assert all(step["grad_norm"] > 0 for step in steps if "skipped" not in step)


ROWS: dict[str, Layout] = {
    "one row": (1, ["train.micro_batch_size=1"]), "no sharing": (1, ["policy.share_prompts=false"]),
    "four rows": (1, ["train.micro_batch_size=4"]), "long rows": (1, ["data.phases.0.seq_len=256"]),
    "two rows, DP2": (2, ["train.micro_batch_size=2"]), "least rows": (1, ["data.phases.0.seq_len=20"])}


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("method", ["grpo", "dapo"])
def test_rounds_are_the_same_steps_in_rows_of_any_length(method: PolicyMethod, ranks: Any, job: Any,
                                                         packed_data: Any, write_round: Any, tmp_path: Path
                                                         ) -> None:
    """Prompts are shared within micro-batches: of one row, several, or all of a step."""
    publish_rounds(tmp_path, packed_data, write_round, PolicyConfig(method=method, max_gen_batches=1),
                   seq_len=20, one_prompt=True)
    steps = train_at_layouts(ranks, job, tmp_path, ROWS, [*POLICY_LOSS_ONLY, f"policy.method={method}"])
    assert len(steps) == 4 and all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.distributed
def test_a_round_has_the_same_files_at_any_number_of_processes(ranks: Any, job: Any, packed_data: Any,
                                                               write_round: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(6)))
    prompts, digest = read_prompts(file), tokenizer_digest(packed_data.tokenizer)
    write_round(RolloutStore.create(tmp_path / "store", digest, 368), prompts, ROLLOUT, 1, VERSION)
    results = ranks(*(job(__file__, "publish", nproc, {
        "settings": [*ROUNDS, "policy.max_gen_batches=1"], "rounds": str(tmp_path / str(nproc)),
        "store": str(tmp_path / "store"), "prompts": str(file), "tokenizer": str(packed_data.tokenizer),
        "version": VERSION}) for nproc in (1, 2, 4)))
    assert results == [[""], [""] * 2, [""] * 4]
    manifest, *manifests = (read_manifest(tmp_path / str(nproc) / "0001") for nproc in (1, 2, 4))
    assert len(manifest.files) == 10  # of two shards
    assert all((other.files, other.content) == (manifest.files, manifest.content) for other in manifests)
