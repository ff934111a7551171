"""Typhoon-S 8B (arXiv 2601.18129): ThaiLLM-8B or Qwen3-8B-Base is fine-tuned, then learns from a teacher what
it writes itself, as the authors' scripts do."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.model.config import (
    DataConfig, DistillationConfig, ObjectiveConfig, OptimConfig, ParallelConfig, PhaseConfig, RunConfig,
    TrainConfig)
from megatron_sov.model.recipes.open_models import dense_sources, qwen3_8b
from megatron_sov.model.recipes.sources import Sources, derive, ours, published

TYPHOON_SCRIPT = "scb-10x/typhoon-s, trl/train_sft.sh"
TYPHOON_TOKENS = 680_000_000
"""Two epochs of about 340,000 conversations of a thousand tokens."""


OPD_STEPS = 2500
"""One epoch of about 160,000 prompts, 64 a step."""
OPD_TOKENS = OPD_STEPS * 64 * 4096


def typhoon_s_8b() -> RunConfig:
    """Return the run, for `sft`: two epochs packed to 16K, 32 samples a step, cosine from 2e-5 to 0."""
    return RunConfig(
        recipe="typhoon-s-8b",
        model=replace(qwen3_8b().model, max_position_tokens=32768),
        parallel=ParallelConfig(zero1=True),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=TYPHOON_TOKENS, seq_len=16384),)),
        optim=OptimConfig(lr=2e-5, min_lr=0.0, schedule="cosine", warmup_steps=65, weight_decay=0.0,
                          beta2=0.999),
        train=TrainConfig(global_batch_size=32, micro_batch_size=1, seed=42, recompute=True),
        objective=ObjectiveConfig(name="sft"),
    )


def typhoon_s_8b_opd() -> RunConfig:
    """Return on-policy distillation, for `distill`: the teacher's whole distribution, forward KL."""
    run = typhoon_s_8b()
    return replace(
        run, recipe="typhoon-s-8b-opd",
        data=DataConfig(phases=(PhaseConfig("opd", tokens=OPD_TOKENS, seq_len=4096),)),
        optim=replace(run.optim, lr=1e-6, warmup_steps=OPD_STEPS // 20),
        train=replace(run.train, global_batch_size=64, steps=OPD_STEPS),
        objective=ObjectiveConfig(name="distill"),
        distillation=DistillationConfig(beta=0.0, temperature=1.0, top_k=0))


_TYPHOON_TRAINER = published(f"{TYPHOON_SCRIPT} leaves it to transformers' trainer")
TYPHOON_SOURCES: Sources = derive(dense_sources("Qwen/Qwen3-8B-Base"), {
    "data.phases.*.name": ours("the stage"),
    "data.phases.*.tokens": ours("2 epochs of about 340,000 samples are published, their tokens are not"),
    "data.phases.*.seq_len": published(TYPHOON_SCRIPT),
    **dict.fromkeys(("optim.name", "optim.lr", "optim.schedule"), published(TYPHOON_SCRIPT)),
    "optim.warmup_steps": published(f"{TYPHOON_SCRIPT}: 5 % of the steps"),
    **dict.fromkeys(("optim.min_lr", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps",
                     "optim.clip_grad"), _TYPHOON_TRAINER),
    "train.global_batch_size": published(f"{TYPHOON_SCRIPT}: 8 processes x 1 sample x 4"),
    "train.micro_batch_size": published(TYPHOON_SCRIPT),
    "train.seed": published(TYPHOON_SCRIPT),
    "train.recompute": ours("memory; it changes no result"),
    "objective.name": published("arXiv 2601.18129, SFT"),
})
_OPD = "scb-10x/typhoon-s, on-policy distillation"
OPD_SOURCES: Sources = derive(TYPHOON_SOURCES, {
    "data.phases.*.tokens": ours("an upper bound: what all steps read if every row is full"),
    "data.phases.*.seq_len": published(f"{_OPD}: 2,048 of a response, 4,096 in all"),
    **dict.fromkeys(("optim.lr", "optim.schedule"), published(f"{_OPD}: 1e-6, cosine")),
    "optim.warmup_steps": published(f"{_OPD}: 5 % of the steps"),
    "train.steps": published(f"{_OPD}: 1 epoch of about 160,000 prompts"),
    "train.global_batch_size": published(f"{_OPD}: 64 samples; a row that holds several counts once here"),
    "objective.name": published("arXiv 2601.18129, on-policy distillation"),
    **dict.fromkeys(("distillation.beta", "distillation.temperature", "distillation.top_k"),
                    published(f"{_OPD}: forward KL over the whole vocabulary")),
})
