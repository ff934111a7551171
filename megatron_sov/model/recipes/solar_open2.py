"""Solar Open 2 250B-A15B (arXiv 2607.20062): the released architecture, the published tokens and languages.

Its report was not at hand beyond its abstract, which is in transformers' page of the model, and the released
card.  Both say what it begins with (5.69 billion parameters of Solar Open 102B, which no command here carries
over), that it has 10 T tokens of a mixture and about 12 T in all, and that twelve specialists are distilled
into it.  Phases, blends, rates, batches, lengths of stages and layouts are ours, and labelled so.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.model.config import (
    DataConfig, ExtendConfig, ExtendStageConfig, GateConfig, GpuConfig, ModelConfig, NeedleConfig,
    OptimConfig, ParallelConfig, PartConfig, PhaseConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.model import LinearAttentionConfig
from megatron_sov.model.recipes.extension import PHASE_SOURCES, SET_IN_A_STAGE, stage_phases
from megatron_sov.model.recipes.sources import Sources, config_json, derive, ours, published

ABSTRACT = "arXiv 2607.20062, abstract"
CARD = "the card of upstage/Solar-Open2-250B"
TRILLION = 1_000_000_000_000

PHASES = (
    PhaseConfig("mixture", tokens=10 * TRILLION, seq_len=8192, blend={
        "web": 40.0, "korean": 10.0, "japanese": 5.0, "code": 15.0, "stem": 10.0, "synthetic": 20.0}),
    PhaseConfig("agents", tokens=2 * TRILLION, seq_len=8192, blend={
        "web": 20.0, "korean": 10.0, "japanese": 5.0, "code": 20.0, "stem": 15.0,
        "agent-trajectories": 30.0}),
)


def _stage(name: str, seq_len: int, batch_size: int, long_share: float,
           rehearsal_share: float) -> ExtendStageConfig:
    """Return a stage of the extension: long documents, rehearsal, and agents' trajectories as the rest."""
    rehearsal = {"web/8192": 60.0, "korean/8192": 20.0, "japanese/8192": 10.0, "needle/8192": 10.0}
    return ExtendStageConfig(
        name, seq_len=seq_len, steps=1000, max_steps=2000, global_batch_size=batch_size,
        blend={"agent-trajectories": 1.0},
        parts=(PartConfig("long", long_share), PartConfig("rehearsal", rehearsal_share, rehearsal)))


STAGES = (_stage("64k", 65536, 512, 0.4, 0.3), _stage("256k", 262144, 128, 0.5, 0.2),
          _stage("1m", 1048576, 32, 0.6, 0.2))


def model() -> ModelConfig:
    """Return the architecture: blocks of a layer with gated softmax attention and three with Kimi Delta
    Attention, no positions, 8 of 320 experts in every layer."""
    return ModelConfig(
        family="solar_open2", vocab_size=196608, hidden_size=4096, num_layers=48, num_heads=64,
        num_kv_heads=8, head_dim=128, dense_ffn_dim=10240, num_experts=320, num_experts_per_token=8,
        num_shared_experts=1, expert_ffn_dim=1280, routed_scaling_factor=1.0, attention_pattern="GDDD",
        linear_attention=LinearAttentionConfig(64, 64, 128, 128, 4, 128, negative_eigenvalues=True),
        attention_output_gate=True, rope_on_global=False, rope_theta=10_000.0, norm_eps=1e-5,
        max_position_tokens=1048576)


def solar_open2_250b() -> RunConfig:
    """Return the pretraining run: 12 T tokens in two phases at 8K, AdamW, cosine from 2.5e-4 to 3e-6."""
    return RunConfig(
        recipe="solar-open2-250b",
        model=model(),
        parallel=ParallelConfig(ep=32, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2.5e-4, min_lr=3e-6, schedule="cosine", warmup_steps=2000, weight_decay=0.1,
                          beta2=0.95),
        train=TrainConfig(global_batch_size=4096, micro_batch_size=1, recompute=True),
        gpu=GpuConfig(gc_every_steps=100),
    )


def solar_open2_250b_extend() -> RunConfig:
    """Return the extension 8K -> 64K -> 256K -> 1M, to be run by `extend`: gated stages.  No layer has
    positions, so that nothing is stretched."""
    run = solar_open2_250b()
    optim = replace(run.optim, lr=3e-5, warmup_steps=100)
    return replace(
        run, recipe="solar-open2-250b-extend",
        parallel=replace(run.parallel, tp=8, sp=True, cp=8, ep=64),
        data=DataConfig(phases=stage_phases(STAGES, optim)), optim=optim,
        train=replace(run.train, global_batch_size=512),
        needle=NeedleConfig(lengths_tokens=(8192, 65536, 262144, 1048576)),
        extend=ExtendConfig(stages=STAGES, gate=GateConfig(every_steps=250, min_accuracy=0.98)))


_NOT_READ = "its report was not at hand"
_AS_SOLAR = f"as Solar Open; {_NOT_READ}"
SOURCES: Sources = {
    "model.*": config_json("upstage/Solar-Open2-250B, as transformers' class and vLLM's test have it; as "
                           "many parameters as the card, to the last one"),
    "model.router_bias_update_rate": ours(_AS_SOLAR),
    "model.seq_aux_loss_coeff": ours(_AS_SOLAR),
    "parallel.*": ours("a layout that fits; none is published"),
    "data.phases.*.name": ours(_NOT_READ),
    "data.phases.*.seq_len": ours(_NOT_READ),
    "data.phases.0.tokens": published(f"{ABSTRACT}: a mixture of 10 T tokens"),
    "data.phases.1.tokens": ours(f"what {CARD} has beyond the mixture: about 12 T in all"),
    "data.phases.*.blend.*": ours(f"languages by {CARD}, agents by the abstract; no shares were at hand"),
    **dict.fromkeys(("optim.lr", "optim.min_lr", "optim.schedule", "optim.warmup_steps",
                     "optim.weight_decay", "optim.beta2"), ours(_AS_SOLAR)),
    "train.global_batch_size": ours(f"33.6 M tokens a step; {_NOT_READ}"),
    "train.micro_batch_size": ours("memory"),
    "train.recompute": ours("memory"),
    "gpu.gc_every_steps": ours("processes collect garbage together"),
}
EXTEND_SOURCES = derive(SOURCES, {
    **PHASE_SOURCES,
    "optim.lr": ours(f"about a tenth of pretraining's peak; {_NOT_READ}"),
    "optim.warmup_steps": ours(_NOT_READ),
    "train.global_batch_size": ours(f"33.6 M tokens a step, as in pretraining; {_NOT_READ}"),
    "needle.lengths_tokens": ours("the lengths of pretraining and of all stages"),
    **dict.fromkeys(SET_IN_A_STAGE, ours(_NOT_READ)),
    "extend.stages.0.seq_len": ours(_NOT_READ),
    "extend.stages.1.seq_len": ours(_NOT_READ),
    "extend.stages.2.seq_len": published(f"{CARD}: 1M"),
    "extend.stages.*.blend.*": ours(f"agents' trajectories fill one context, by the abstract; {_NOT_READ}"),
    "extend.stages.*.parts.*": ours(_NOT_READ),
    "extend.gate.every_steps": ours(_NOT_READ),
    "extend.gate.min_accuracy": ours(_NOT_READ),
})
