"""Published rounds give equal steps at every layout and micro-batch size."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig
from megatron_sov.model.config.post_training import PolicyMethod
from megatron_sov.model.config.run import add_rounds
from megatron_sov.post.rl.publish.publisher import Publisher
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.rows import RewardRow
from megatron_sov.rollouts.store import RolloutStore

RUN = str(Path(__file__).with_name("round_run.py"))
VERSION = "a" * 64
ROLLOUT = RolloutConfig(rounds=2, prompts_per_round=4, samples_per_prompt=4, steps_per_round=2,
                        piece_prompts=2, max_new_tokens=12, max_prompt_tokens=6)
ROUNDS = [f"rollout.{name}={json.dumps(value)}" for name, value in dataclasses.asdict(ROLLOUT).items()]
Layout = tuple[int, list[str]]


def publish(folder: Path, packed_data: Any, write_round: Any, policy: PolicyConfig, *, seq_len: int,
            rewards: Sequence[float] = (), **more: bool) -> None:
    """Write and publish two rounds; with `rewards`, all responses to prompt n of the first round have the
    n-th reward."""
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
        places = [prompt.id for prompt in select_round_prompts(prompts, ROLLOUT, number)]
        for part in store.parts(number) if rewards else ():
            store.add_rewards(VERSION, part.name, [
                RewardRow(row.key, 0, VERSION, rewards[places.index(row.key.prompt)] * (
                    row.key.sample > 0 or number == 1), "scored") for row in store.read_rollouts(part.name)])
        assert publisher.publish(number) == ""


def curves(ranks: Any, job: Any, folder: Path, layouts: dict[str, Layout], settings: list[str]
           ) -> list[dict[str, Any]]:
    """Train the rounds at some layouts, see that all do the same, and return the steps of the first."""
    jobs = []
    for i, (nproc, layout) in enumerate(layouts.values()):
        shutil.copytree(folder / "rounds", folder / settings[-1] / str(i) / "rounds")
        jobs.append(job(RUN, "curve", nproc, {"settings": [*ROUNDS, *settings, *layout],
                                              "folder": str(folder / settings[-1] / str(i))}))
    (reference,), *others = ranks(*jobs)
    for name, per_rank in zip(list(layouts)[1:], others, strict=True):
        for steps in per_rank:
            for number, (ours, theirs) in enumerate(zip(steps, reference, strict=True), 1):
                for what, value in theirs.items():
                    # the trainer's own column is kept in float32
                    assert np.allclose(ours[what], value, rtol=1e-6, atol=1e-8), f"{name}: {number}: {what}"
    found: list[dict[str, Any]] = reference
    return found


NOTHING_ELSE = ["model.seq_aux_loss_coeff=0", "model.router_bias_update_rate=0", "model.num_mtp_layers=0"]


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("settings", "computed"), [
    (NOTHING_ELSE, [False, False, True, True]),
    (NOTHING_ELSE[:2], [True] * 4), (NOTHING_ELSE[1:], [True] * 4)])
def test_steps_without_advantages_are_passed_over_at_every_number_of_processes(
        settings: list[str], computed: list[bool], ranks: Any, job: Any, packed_data: Any, write_round: Any,
        tmp_path: Path) -> None:
    """All rewards of a group of round 1 are equal; in round 2 one differs."""
    publish(tmp_path, packed_data, write_round, PolicyConfig(method="grpo"), seq_len=32,
            rewards=[0.1, 1.0, 0.7, 0.3])
    layouts: dict[str, Layout] = {"one rank": (1, []), "DP2": (2, [])}
    steps = curves(ranks, job, tmp_path, layouts, ["policy.method=grpo", *settings, "rollout.seed=0"])
    assert ["passed over" not in step for step in steps] == computed
    assert all(step["grad_norm"] > 0 for step, is_learned in zip(steps, computed, strict=True) if is_learned)


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
    publish(tmp_path, packed_data, write_round, PolicyConfig(method=method, max_gen_batches=1), seq_len=20,
            one_prompt=True)
    steps = curves(ranks, job, tmp_path, ROWS, [*NOTHING_ELSE, f"policy.method={method}"])
    assert len(steps) == 4 and all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.distributed
def test_a_round_has_the_same_files_at_any_number_of_processes(ranks: Any, job: Any, packed_data: Any,
                                                               write_round: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(6)))
    prompts, digest = read_prompts(file), tokenizer_digest(packed_data.tokenizer)
    write_round(RolloutStore.create(tmp_path / "store", digest, 368), prompts, ROLLOUT, 1, VERSION)
    results = ranks(*(job(RUN, "publish", nproc, {
        "settings": [*ROUNDS, "policy.max_gen_batches=1"], "rounds": str(tmp_path / str(nproc)),
        "store": str(tmp_path / "store"), "prompts": str(file), "tokenizer": str(packed_data.tokenizer),
        "version": VERSION}) for nproc in (1, 2, 4)))
    assert results == [[""], [""] * 2, [""] * 4]
    one, *others = (read_manifest(tmp_path / str(nproc) / "0001") for nproc in (1, 2, 4))
    assert len(one.files) == 10  # of two shards
    assert all(other.files == one.files and other.content == one.content for other in others)
