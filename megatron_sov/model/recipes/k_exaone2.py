"""K-EXAONE 2.0 750B-A37B (arXiv 2608.04505), which goes on from K-EXAONE 236B, grown in depth and experts.

Its report and its config.json were not at hand.  The sizes are those that programs read of that config:
Megatron-Bridge (a recipe, and a verification card that counts 59,396 tensors of 1,498,715,008,512 bytes,
which this architecture has to the byte), TensorRT-LLM's pull request 17067 (bounds from layer 62 on, a window
of 4096 in layer 1) and vLLM's `exaone_moe`.  Tokens, rates and blends are ours.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.model.config import (
    DataConfig, ExtendConfig, GateConfig, ModelConfig, NeedleConfig, OptimConfig, ParallelConfig, PhaseConfig,
    RunConfig)
from megatron_sov.model.recipes import k_exaone
from megatron_sov.model.recipes.extension import PHASE_SOURCES, SET_IN_A_STAGE, stage_phases
from megatron_sov.model.recipes.sources import Sources, config_json, derive, ours, published

REPORT = "arXiv 2608.04505"
BRIDGE = "Megatron-Bridge, recipe exaone_moe_2_0_750b_a37_pretrain_512gpu_h100_bf16"
LAYERS = "GL" + 19 * "LLLG"
FIRST_BOUNDED, NUM_LAYERS = 62, 78
TOKENS = 2_000_000_000_000


def model() -> ModelConfig:
    """Return the architecture: two dense layers, of which the second sees 4,096 tokens, then blocks of three
    layers that see 128 and a global one without positions; SwiGLU bounded in the last 16 layers; one
    prediction layer, which slides, applied four times."""
    return replace(
        k_exaone.model(), num_layers=NUM_LAYERS, num_dense_layers=2, num_experts=256,
        attention_pattern=LAYERS[:-1],  # which begins anew with the last layer
        layer_windows=tuple(4096 if i == 1 else 128 * (kind == "L") for i, kind in enumerate(LAYERS)),
        swiglu_limits=tuple(7.0 if i >= FIRST_BOUNDED else 0.0 for i in range(NUM_LAYERS)),
        mtp_attention="L", mtp_depths=4)


def k_exaone2_750b() -> RunConfig:
    """Return the pretraining behind the growth: 2 T tokens at 8K, of K-EXAONE's second and third stage."""
    base = k_exaone.k_exaone_236b()
    phases = tuple(PhaseConfig(phase.name, tokens=round(share * TOKENS), seq_len=8192, blend=phase.blend)
                   for phase, share in zip(k_exaone.PHASES[1:], (0.7, 0.3), strict=True))
    return replace(
        base, recipe="k-exaone2-750b", model=model(), data=DataConfig(phases=phases),
        parallel=ParallelConfig(tp=4, sp=True, pp=16, ep=32, zero1=True,
                                pipeline_layout=(6, *[5] * 14, 2), overlap_grad_reduce=True,
                                overlap_param_gather=True),
        optim=replace(base.optim, lr=1e-4, min_lr=1e-5, warmup_steps=500),
        train=replace(base.train, fp8="none"))


def k_exaone2_750b_extend() -> RunConfig:
    """Return the extension 8K -> 32K -> 256K, with the stages and gates of K-EXAONE's."""
    run = k_exaone2_750b()
    optim = OptimConfig(name="muon", lr=1e-5, min_lr=1e-6, schedule="cosine", warmup_steps=100,
                        weight_decay=0.1)
    return replace(
        run, recipe="k-exaone2-750b-extend", parallel=replace(run.parallel, tp=8, cp=8, ep=64),
        data=DataConfig(phases=stage_phases(k_exaone.STAGES, optim)), optim=optim,
        train=replace(run.train, global_batch_size=1024),
        needle=NeedleConfig(lengths_tokens=(8192, 32768, 262144)),
        extend=ExtendConfig(stages=k_exaone.STAGES, gate=GateConfig(every_steps=250, min_accuracy=0.98)))


_NOT_READ = "its report was not at hand"
SOURCES: Sources = derive(k_exaone.SOURCES, {
    "model.*": config_json("LGAI-EXAONE/K-EXAONE-2.0-750B-A37B, as Megatron-Bridge, TensorRT-LLM and vLLM "
                           "read it; its count of bytes agrees"),
    "model.router_bias_update_rate": ours(f"as K-EXAONE; {_NOT_READ}"),
    "model.seq_aux_loss_coeff": ours(f"as K-EXAONE; {_NOT_READ}"),
    "model.mtp_loss_coeff": ours(f"as K-EXAONE; {_NOT_READ}"),
    **{f"parallel.{name}": published(f"{BRIDGE}: 512 H100")
       for name in ("tp", "sp", "pp", "ep", "zero1", "pipeline_layout", "overlap_grad_reduce",
                    "overlap_param_gather")},
    "data.phases.*.name": ours(f"as K-EXAONE's; {_NOT_READ}"),
    "data.phases.*.tokens": ours(f"2 T behind the growth; {_NOT_READ}"),
    "data.phases.*.seq_len": ours(f"as K-EXAONE; {_NOT_READ}"),
    "data.phases.*.blend.*": ours(f"as K-EXAONE's; {_NOT_READ}"),
    "optim.name": ours(f"as K-EXAONE; {_NOT_READ}"),
    "optim.lr": ours(f"a third of K-EXAONE's peak; {_NOT_READ}"),
    "optim.min_lr": ours("a tenth of the peak"),
    "optim.schedule": ours(f"as K-EXAONE; {_NOT_READ}"),
    "optim.warmup_steps": ours("a quarter of K-EXAONE's: the model is trained already"),
    "train.fp8": published(f"{BRIDGE}: bf16"),
    "train.recompute": published(BRIDGE),
    "train.micro_batch_size": published(BRIDGE),
})
EXTEND_SOURCES = derive(derive(k_exaone.EXTEND_SOURCES, SOURCES), {
    "parallel.*": ours("a layout that fits; none is published"),
    **{f"parallel.{name}": ours("a layout that fits; none is published")
       for name in ("tp", "sp", "pp", "ep", "zero1", "pipeline_layout", "overlap_grad_reduce",
                    "overlap_param_gather")},
    **PHASE_SOURCES,
    "optim.lr": ours("where pretraining ends"),
    "optim.schedule": ours("as K-EXAONE's"),
    "optim.warmup_steps": ours("as K-EXAONE's"),
    "optim.decay_share": k_exaone.EXTEND_SOURCES["optim.decay_share"],
    **{key: ours(f"as K-EXAONE's; {_NOT_READ}") for key in (
        *SET_IN_A_STAGE, "extend.stages.*.seq_len", "extend.stages.*.kind", "extend.stages.*.blend.*",
        "extend.stages.*.parts.*.name", "extend.stages.*.parts.*.share", "extend.stages.*.parts.*.blend.*",
        "extend.gate.every_steps", "extend.gate.min_accuracy", "extend.gate.loss_tolerance_nats")},
})
