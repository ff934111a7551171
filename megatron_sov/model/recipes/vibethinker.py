"""VibeThinker-1.5B (arXiv 2511.06221): Qwen2.5-Math-1.5B made ready for 40,960 tokens in three stages, then
fine-tuned.

`extend` lengthens the base, `sft` trains on from there.  The report has no rates and no batches.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.model.config import (
    DataConfig, ExtendConfig, ExtendStageConfig, GateConfig, NeedleConfig, ObjectiveConfig, OptimConfig,
    ParallelConfig, PartConfig, PhaseConfig, RunConfig, TrainConfig)
from megatron_sov.model.recipes.extension import SET_IN_A_STAGE
from megatron_sov.model.recipes.open_models import dense_sources, qwen2_1_5b
from megatron_sov.model.recipes.sources import Sources, derive, ours, published

VIBETHINKER_REPORT = "arXiv 2511.06221"
LENGTHS, THETA = {"16k": 16384, "32k": 32768, "40k": 40960}, 500_000.0
VIBETHINKER_LENGTH = LENGTHS["40k"]
VIBETHINKER_STAGES = tuple(
    ExtendStageConfig(name, seq_len=seq_len, steps=500, max_steps=2000, global_batch_size=128,
                      rope_theta=THETA, parts=(PartConfig("long", 0.5), PartConfig("rehearsal", 0.25)))
    for name, seq_len in LENGTHS.items())
"""The lengths at which the report trains by reinforcement, and the one that it generates: a response is
learned at no position that the model has not met in text."""


def vibethinker_1_5b() -> RunConfig:
    """Return the extension 4K -> 16K -> 32K -> 40,960 by slower rotations, gated, and fine-tuning at 16K."""
    return RunConfig(
        recipe="vibethinker-1.5b",
        model=replace(qwen2_1_5b().model, rope_theta=THETA, max_position_tokens=VIBETHINKER_LENGTH),
        parallel=ParallelConfig(zero1=True),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=5_000_000_000, seq_len=16384),)),
        optim=OptimConfig(lr=5e-5, min_lr=8e-8, schedule="cosine", warmup_steps=120, weight_decay=0.1),
        train=TrainConfig(global_batch_size=128, micro_batch_size=1, recompute=True,
                          checkpoint_every_steps=100, keep_every_steps=100),
        objective=ObjectiveConfig(name="sft"),
        needle=NeedleConfig(lengths_tokens=(4096, *LENGTHS.values())),
        extend=ExtendConfig(stages=VIBETHINKER_STAGES, gate=GateConfig(every_steps=100, min_accuracy=0.98)),
    )


_VIBETHINKER_SUCCESSOR = ours("not published for the 1.5B; published for the 3B")
VIBETHINKER_SOURCES: Sources = derive(dense_sources("Qwen/Qwen2.5-Math-1.5B"), {
    "model.rope_theta": ours("not published; others lengthen this base by it (NVIDIA-NeMo/Skills)"),
    "model.max_position_tokens": published(f"{VIBETHINKER_REPORT}, evaluation: 40,960 tokens are generated"),
    "data.phases.*.name": ours("the stage"),
    "data.phases.*.tokens": ours("not published"),
    "data.phases.*.seq_len": published(f"{VIBETHINKER_REPORT}, training: 16K before 32K"),
    **dict.fromkeys(("optim.lr", "optim.min_lr", "optim.schedule"), _VIBETHINKER_SUCCESSOR),
    "optim.warmup_steps": ours("5 % of the steps, as published for the 3B"),
    "optim.weight_decay": ours("not published"),
    "train.global_batch_size": _VIBETHINKER_SUCCESSOR,
    "train.micro_batch_size": ours("memory"),
    "train.checkpoint_every_steps": ours("checkpoints to choose from are published, their distance is not"),
    "train.keep_every_steps": ours("checkpoints to choose from are published, their distance is not"),
    "objective.name": published(f"{VIBETHINKER_REPORT}, spectrum phase"),
    "needle.lengths_tokens": ours("the base's and the stages'"),
    **dict.fromkeys(SET_IN_A_STAGE, ours("not published")),
    "extend.stages.*.seq_len": published(f"{VIBETHINKER_REPORT}: 16K and 32K in training, 40,960 in evaluation; that "
                                         "text of these lengths comes first is ours"),
    "extend.stages.*.rope_theta": ours("not published; others lengthen this base by it (NVIDIA-NeMo/Skills)"),
    "extend.stages.*.parts.*": ours("not published"),
    "extend.gate.every_steps": ours("not published"),
    "extend.gate.min_accuracy": ours("near-perfect, as K-EXAONE asks"),
})
