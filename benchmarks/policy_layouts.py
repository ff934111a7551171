"""Losses and gradients of policies at every layout, beside one process: in float64, and in fp32.

Usage: python benchmarks/policy_layouts.py > benchmarks/results/policy_layouts.txt

A published round of scripted responses and advantages is the first step of a model of some thousand
parameters with experts.  Printed is, over all objectives, the largest relative difference from one process of
the loss, of the gradient's norm, and of any gradient beside the largest of its tensor.  Asked for are 1e-12
in float64 and 2e-7, a rounding or two, in fp32.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from kills import make_data

from megatron_sov import recipes
from megatron_sov.base.digests import file_digest
from megatron_sov.model.config import RolloutConfig, RunConfig, apply_settings
from megatron_sov.model.config.run import with_rounds
from megatron_sov.rollouts.prompts import RolloutPrompt, pieces, read_prompts, round_prompts
from megatron_sov.rollouts.rows import STOP, Key, RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore

VERSION, VOCAB = "a" * 64, 368
ROLLOUT = RolloutConfig(rounds=1, prompts_per_round=8, samples_per_prompt=4, piece_prompts=8,
                        max_new_tokens=16, max_prompt_tokens=6)
SETTINGS = (f"model.vocab_size={VOCAB}", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
            "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4", "model.dense_ffn_dim=48",
            "model.sliding_window_tokens=8", "train.micro_batch_size=2", "train.global_batch_size=8",
            "train.head_chunk_tokens=24", "optim.warmup_steps=1", "objective.name=policy",
            'data.phases=[{"name": "main", "seq_len": 32}]')
POLICIES = {
    "grpo": ["policy.method=grpo", "policy.kl=none"], "dr_grpo": ["policy.method=dr_grpo"],
    "dapo": ["policy.method=dapo", "policy.max_gen_batches=1"], "gspo": ["policy.method=gspo"],
    "cispo": ["policy.method=cispo", "policy.clip_high=0.25"],
    "agapo": ["policy.method=agapo", "policy.clip_high=4"],
    "mgpo": ["policy.method=mgpo", "policy.mgpo_lambda=1", "policy.clip_low=0.2", "policy.clip_high=0.2"],
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []), "micro-batch 1": (1, ["train.micro_batch_size=1"]),
    "micro-batch 8": (1, ["train.micro_batch_size=8"]), "DP2": (2, []),
    "TP2+SP": (2, ["parallel.tp=2", "parallel.sp=true"]), "EP2": (2, ["parallel.ep=2"]),
    "PP2": (2, ["parallel.pp=2"]), "PP2 VPP2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "CP2": (2, ["parallel.cp=2"]),
}
GOALS = {"fp64": 1e-12, "fp32": 2e-7}


def config_of(settings: list[str]) -> RunConfig:
    """Return the settings of a run."""
    return with_rounds(replace(apply_settings(recipes.get("tiny-k-exaone"), [*SETTINGS, *settings]),
                               rollout=ROLLOUT))


def row(prompt: RolloutPrompt, sample: int) -> Rollout:
    """Return a response drawn by lot."""
    drawn = np.random.default_rng([int(prompt.id, 16), sample])
    count = int(drawn.integers(4, ROLLOUT.max_new_tokens))
    return Rollout(Key(prompt.id, sample, "0" * 64, "sampling"), 1, 0, prompt.record,
                   drawn.integers(0, VOCAB, 4).astype(np.int32),
                   drawn.integers(0, VOCAB, count).astype(np.int32),
                   -5.5 - drawn.random(count).astype(np.float32), np.zeros(count, np.int32), STOP, "text",
                   1.0, "scripted", 0.0, 1.0)


def publish(work: Path, name: str) -> None:
    """Publish the round for one objective."""
    from megatron_sov.post.rl.publish import Publisher

    prompts = read_prompts(work / "prompts.jsonl")
    store = RolloutStore.create(work / "store", file_digest(work / "tokenizer/tokenizer.json", "sha256"),
                                VOCAB)
    for piece in pieces(round_prompts(prompts, ROLLOUT, 1), 1, ROLLOUT.piece_prompts):
        rows = [row(prompt, s) for prompt in piece.prompts for s in range(ROLLOUT.samples_per_prompt)]
        store.add_rollouts(piece.part(), rows, {})
        rewards = np.random.default_rng(0).random(len(rows)).tolist()
        store.add_rewards(VERSION, piece.part(), [
            RewardRow(r.key, 0, VERSION, reward, "scored") for r, reward in zip(rows, rewards, strict=True)])
    config = config_of(POLICIES[name])
    publisher = Publisher(config, work / name / "rounds", store.path, prompts, VERSION, work / "tokenizer")
    if problem := publisher.publish(1):
        raise SystemExit(problem)


def on_rank(work: Path, out: Path, settings: list[str]) -> int:
    """Leave loss, norm and gradients of each objective's first step."""
    import torch

    from megatron_sov.checkpoint import load
    from megatron_sov.engine.parallel import world
    from megatron_sov.post.policy import objective_of
    from megatron_sov.post.rl.feed import RoundFeed, columns_of_run
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.runs.rounds import Policy, RunPolicies
    from megatron_sov.train.data.rounds import rounds_of, rounds_source
    from megatron_sov.train.stopping import StopFlag
    from megatron_sov.train.trainer import Trainer

    place, told = None, {}
    for name, policy in POLICIES.items():
        config = config_of([*policy, *settings])
        place = world.join(config.parallel) if place is None else place
        config.check(place.size)
        objective = objective_of(config)
        columns = columns_of_run(config, objective.columns, work)
        source = rounds_source(out / name / "rounds", VOCAB, None, columns.names)
        rounds = rounds_of([source])
        assert rounds is not None
        feed = RoundFeed(rounds, config.rollout, lambda number: "", columns,
                         RunPolicies(out, Policy(work, 0, "start"), config.rollout, {}))
        trainer = Trainer(config, place, RunFolder(out / "run"), [source], objective, feed=feed)
        assert trainer.bring_data(StopFlag()) is None
        batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, 0))
        sums = trainer.computation.sums(batch, trainer.objective, 1)
        loss = sum(trainer.objective.coefficients[t] * total / batch.targets[t]
                   for t, total in sums.terms.items())
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.copy_(parameter.main_grad)
        load.save(out / name / "gradients", trainer.model, None, {"step": 0, "tokens": 0}, config.to_dict(),
                  work / "tokenizer")
        told[name] = loss
        trainer.batches.close()
    assert place is not None
    if place.is_main:
        (out / "losses.json").write_text(json.dumps(told))
    world.leave()
    return 0


def gradients(folder: Path) -> dict[str, Any]:
    """Return a step's gradients, whole."""
    from megatron_sov.checkpoint.sharded_tensors import TensorReader

    reader = TensorReader(folder, "model")
    return {key: reader.read(key).double() for key in reader.keys()}  # noqa: SIM118  (a reader is no dict)


def apart(out: Path, reference: Path) -> list[float]:
    """Return the largest differences of loss, norm and gradients over all objectives."""
    ours, theirs = (json.loads((folder / "losses.json").read_text()) for folder in (out, reference))
    found = [max(abs(ours[name] / theirs[name] - 1) for name in POLICIES), 0.0, 0.0]
    for name in POLICIES:
        here, there = (gradients(folder / name / "gradients") for folder in (out, reference))
        norms = [sum(float(g.square().sum()) for g in some.values()) ** 0.5 for some in (here, there)]
        found[1] = max(found[1], abs(norms[0] / norms[1] - 1))
        found[2] = max(found[2], *(float((here[key] - g).abs().max() / max(float(g.abs().max()), 1e-30))
                                   for key, g in there.items() if here[key].shape == g.shape))
    return found


def main() -> int:
    """Compare all layouts in both precisions."""
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.engine.parallel.launcher import launch

    print(f"{platform.machine()}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}; "
          f"{', '.join(POLICIES)}: largest relative difference from one process\n\n"
          f"{'':<16}{'':<8}{'loss':>10}{'norm':>10}{'gradients':>12}", flush=True)
    sound = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work)
        (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(8)))
        for name in POLICIES:
            publish(work, name)
        for precision, goal in GOALS.items():
            for number, (layout, (nproc, settings)) in enumerate(LAYOUTS.items()):
                out = work / f"{precision}-{number}"
                for name in POLICIES:
                    shutil.copytree(work / name, out / name)
                chosen = [*settings, f"train.precision={precision}"]
                if launch(lambda out=out, chosen=chosen: on_rank(work, out, chosen), nproc, 1):
                    return 1
                if number:
                    found = apart(out, work / f"{precision}-0")
                    sound = sound and max(found[:2]) <= goal
                    print(f"{layout:<16}{precision:<8}{found[0]:>10.1e}{found[1]:>10.1e}{found[2]:>12.1e}",
                          flush=True)
    print("\nlosses and norms within 1e-12 (fp64) and 2e-7 (fp32)" if sound else "\nNOT SO")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
