"""Published Qwen models that training goes on from: their architectures; data,
rate and batch are for fine-tuning.

Start them `--from` converted weights; sizes are those of the models' own config.json.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)
from megatron_sov.recipes.sources import DEFAULT, Sources, config_json, derive, ours

PHASES = (PhaseConfig("continued", tokens=1_000_000_000, seq_len=4096),)


def continued(recipe: str, model: ModelConfig, parallel: ParallelConfig) -> RunConfig:
    """Return a run that goes on from a trained model: a low rate, a short warm-up."""
    return RunConfig(
        recipe=recipe, model=model, parallel=parallel, data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2e-5, min_lr=2e-6, schedule="cosine", warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(global_batch_size=128, micro_batch_size=1, recompute=True))


def qwen2_1_5b() -> RunConfig:
    """Return Qwen2.5-Math-1.5B: biases on query, key and value, tied embeddings, 4K."""
    return continued("qwen2-1.5b", ModelConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2,
        head_dim=128, dense_ffn_dim=8960, num_experts=0, rope_theta=10_000.0, qkv_bias=True,
        tied_embeddings=True, norm_eps=1e-6, max_position_tokens=4096), ParallelConfig())


def qwen3_8b() -> RunConfig:
    """Return Qwen3-8B: QK-norm, no biases, 40K."""
    return continued("qwen3-8b", ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=12288, num_experts=0, rope_theta=1e6, qk_norm=True, norm_eps=1e-6,
        max_position_tokens=40960),
        ParallelConfig())


def qwen3_4b() -> RunConfig:
    """Return Qwen3-4B: as the 8B, narrower, with tied embeddings."""
    return continued("qwen3-4b", ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=9728, num_experts=0, rope_theta=1e6, qk_norm=True, norm_eps=1e-6,
        tied_embeddings=True, max_position_tokens=40960), ParallelConfig())


def qwen3_4b_2507() -> RunConfig:
    """Return Qwen3-4B-Instruct-2507: the 4B with slower rotations, 256K."""
    run = qwen3_4b()
    return replace(run, recipe="qwen3-4b-2507",
                   model=replace(run.model, rope_theta=5e6, max_position_tokens=262144))


def qwen3_moe_30b() -> RunConfig:
    """Return Qwen3-30B-A3B: 8 of 128 experts in every layer by a softmax router, no shared expert, 40K."""
    return continued("qwen3-moe-30b", ModelConfig(
        family="qwen3_moe", vocab_size=151936, hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4,
        head_dim=128, dense_ffn_dim=6144, num_experts=128, num_experts_per_token=8, num_shared_experts=0,
        expert_ffn_dim=768, router_score="softmax", router_bias=False, seq_aux_loss_coeff=1e-3,
        rope_theta=1e6, qk_norm=True, norm_eps=1e-6, max_position_tokens=40960), ParallelConfig(ep=8))


def qwen3_30b_a3b_2507() -> RunConfig:
    """Return Qwen3-30B-A3B-Instruct-2507: the 30B-A3B with slower rotations, 256K."""
    run = qwen3_moe_30b()
    return replace(run, recipe="qwen3-30b-a3b-2507",
                   model=replace(run.model, rope_theta=1e7, max_position_tokens=262144))


TRAINING_SOURCES: Sources = {
    "parallel.*": ours("a layout that fits"),
    "data.phases.*.name": ours("one phase"),
    "data.phases.*.tokens": ours("a billion tokens, to be set"),
    "data.phases.*.seq_len": ours("short enough for every one of these models"),
    **dict.fromkeys(("optim.lr", "optim.min_lr", "optim.schedule", "optim.warmup_steps",
                     "optim.weight_decay"),
                    ours("a low rate that leaves a trained model what it knows")),
    "train.global_batch_size": ours("half a million tokens a step"),
    "train.micro_batch_size": ours("memory"),
    "train.recompute": ours("memory"),
}
"""What the published models were trained by is not what continuing them asks for."""


def moe_sources(released: str) -> Sources:
    """Return the table of a model with experts."""
    return {
        "model.*": config_json(released),
        "model.router_bias_update_rate": DEFAULT,
        "model.seq_aux_loss_coeff": ours("router_aux_loss_coef of config.json, for our form of the loss"),
        "model.mtp_*": DEFAULT,
        **TRAINING_SOURCES,
    }


def dense_sources(released: str) -> Sources:
    """Return the table of a dense model, whose config.json has nothing to say about experts."""
    without = ("num_experts_per_token", "num_shared_experts", "expert_ffn_dim", "router_*", "routed_*",
               "norm_topk_prob", "seq_aux_loss_coeff")
    return derive(moe_sources(released), dict.fromkeys((f"model.{name}" for name in without), DEFAULT))
