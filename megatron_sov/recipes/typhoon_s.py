"""Typhoon-S 8B (arXiv 2601.18129): fine-tuning ThaiLLM-8B or Qwen3-8B-Base as the authors' script does."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import (
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)
from megatron_sov.recipes.qwen import dense_sources, qwen3_8b
from megatron_sov.recipes.sources import Sources, derive, ours, published

SCRIPT = "scb-10x/typhoon-s, trl/train_sft.sh"
TOKENS = 680_000_000
"""Two epochs of about 340,000 conversations of a thousand tokens."""


def typhoon_s_8b() -> RunConfig:
    """Return the run, for `sft`: two epochs packed to 16K, 32 samples a step, cosine from 2e-5 to 0."""
    return RunConfig(
        recipe="typhoon-s-8b",
        model=replace(qwen3_8b().model, max_position_tokens=32768),
        parallel=ParallelConfig(zero1=True),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=TOKENS, seq_len=16384),)),
        optim=OptimConfig(lr=2e-5, min_lr=0.0, schedule="cosine", warmup_steps=65, weight_decay=0.0,
                          beta2=0.999),
        train=TrainConfig(global_batch_size=32, micro_batch_size=1, seed=42, recompute=True),
        objective=ObjectiveConfig(name="sft"),
    )


_TRAINER = published(f"{SCRIPT} leaves it to transformers' trainer")
SOURCES: Sources = derive(dense_sources("Qwen/Qwen3-8B-Base"), {
    "data.phases.*.name": ours("the stage"),
    "data.phases.*.tokens": ours("2 epochs of about 340,000 samples are published, their tokens are not"),
    "data.phases.*.seq_len": published(SCRIPT),
    **dict.fromkeys(("optim.name", "optim.lr", "optim.schedule"), published(SCRIPT)),
    "optim.warmup_steps": published(f"{SCRIPT}: 5 % of the steps"),
    **dict.fromkeys(("optim.min_lr", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps",
                     "optim.clip_grad"), _TRAINER),
    "train.global_batch_size": published(f"{SCRIPT}: 8 processes x 1 sample x 4"),
    "train.micro_batch_size": published(SCRIPT),
    "train.seed": published(SCRIPT),
    "train.recompute": ours("memory; it changes no result"),
    "objective.name": published("arXiv 2601.18129, SFT"),
})
