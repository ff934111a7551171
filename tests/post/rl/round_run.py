"""Runs within ranks: the steps of published rounds as numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sov import recipes
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.config.run import add_rounds
from megatron_sov.post.policy import build_policy_objective
from megatron_sov.post.preference import build_round_objective
from megatron_sov.post.rl.logprob_columns import select_columns
from megatron_sov.post.rl.publish import shards
from megatron_sov.post.rl.publish.publisher import Publisher, list_number_columns
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.run import RolloutCycle
from megatron_sov.rollouts.prompts import read_prompts
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
    world.leave_world()
    return steps


def publish(settings: list[str], rounds: str, store: str, prompts: str, tokenizer: str, version: str) -> str:
    """Publish the first round, one piece per shard; return its missing parts."""
    config = build_config(settings)
    world.join_world(ParallelConfig())
    shards.SHARD_TOKENS = 1
    message = Publisher(config=config, rounds=Path(rounds), store=Path(store), tokenizer=Path(tokenizer),
                        prompts=read_prompts(Path(prompts)), reward_version=version).publish(1)
    world.leave_world()
    return message
