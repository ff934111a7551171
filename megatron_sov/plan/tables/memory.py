"""The account of a process for a step that no recipe describes: of `Workload`, whose model may be a row of a
table.

It is that of the nearest model that a recipe could have, with the weights that this one has more or less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_sov.model.config import (
    GpuConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.gpu import RecomputeModule
from megatron_sov.model.families.count import num_params
from megatron_sov.plan.footprint.held import BF16_BYTES, FLOAT32_BYTES
from megatron_sov.plan.footprint.memory import Account, account
from megatron_sov.plan.speed.traffic import held_params
from megatron_sov.plan.speed.workload import PRECISIONS, ModelShape, Workload

FP8: dict[str, Any] = {precision: fp8 for fp8, precision in reversed(PRECISIONS.items())}
"""Precision of a workload -> the first `train.fp8` that computes in it."""
MODULES: tuple[RecomputeModule, ...] = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
"""What selective recomputation may name."""
WHOLE_LAYER = "layer"
"""In `recompute_modules`: every second layer is computed again."""
GATHERED_LAYERS = 2
"""Layers whose weights are whole at a time under FSDP: one computes, the next is being gathered."""
STATE_BYTES = FLOAT32_BYTES * 3
"""Of a weight's master and AdamW's moments."""


def account_of(workload: Workload, stage: int | None = None) -> Account:
    """Return the account of the fullest process of a pipeline stage; None: of the stage that needs most."""
    if stage is None:
        # between the first, which has most micro-batches under way, and the last, which has the head
        return max((account_of(workload, number) for number in {0, workload.pp - 1}),
                   key=lambda found: found.total)
    config = run_of(workload)
    found = account(config, workload.num_gpus, stage, workload.seq_len, workload.imbalance)
    if WHOLE_LAYER in workload.recompute_modules:
        whole = replace(config, train=replace(config.train, recompute=True),
                        gpu=replace(config.gpu, recompute_modules=()))
        other = account(whole, workload.num_gpus, stage, workload.seq_len, workload.imbalance)
        found = replace(found, layer_inputs=(found.layer_inputs + other.layer_inputs) // 2)
    found = _with_weights(found, workload, *_missing_params(workload.shape, config.model))
    if workload.sharding == "fsdp":
        found = _sharded(found, workload)
    if workload.objective == "forward":
        return replace(found, gradients=0, optimizer=0, layer_inputs=0, update=0, on_host=0,
                       one_layer=found.one_layer // 2)
    if workload.objective == "lora":  # adapters are a hundredth of a model
        return replace(found, gradients=found.gradients // 100, optimizer=found.optimizer // 100)
    return found


def run_of(workload: Workload) -> RunConfig:
    """Return the settings that come nearest to a workload; they need not be a sound run."""
    w = workload
    modules: Any = tuple(name for name in MODULES if name in w.recompute_modules)
    recompute: Any = {"none": False, "full": True, "selective": "selective" if modules else False}
    return RunConfig(
        recipe="workload", model=model_of(w.shape),
        parallel=ParallelConfig(tp=w.tp, sp=w.sp, pp=w.pp, vpp=w.vpp, cp=w.cp, ep=w.ep, etp=w.etp,
                                zero1=w.sharding != "none", overlap_grad_reduce=w.overlap_grad_reduce,
                                pipeline_layout=_stages(w)),
        optim=OptimConfig(name="muon" if w.optimizer == "muon" else "adamw"),
        train=TrainConfig(global_batch_size=max(1, w.global_batch_size), micro_batch_size=w.micro_batch_size,
                          precision="bf16", fp8=FP8[w.precision], recompute=recompute[w.recompute]),
        gpu=GpuConfig(grad_dtype="bf16" if w.grad_bytes == BF16_BYTES else "fp32",
                      optimizer_offload=w.offload,
                      recompute_modules=modules if w.recompute == "selective" else ()))


def _stages(w: Workload) -> tuple[int, ...]:
    """Return the layers of each run of a pipeline, where they cannot be equal; the later ones have fewer."""
    runs, layers = w.pp * w.vpp, _num_layers(w.shape)
    if runs == 1 or layers % runs == 0:
        return ()
    return tuple(layers // runs + (run < layers % runs) for run in range(runs))


def _num_layers(shape: ModelShape) -> int:
    """Return layers that have attention or a Mamba block, and a feed-forward network; in models whose layers
    are one block each, as many as there are of the more frequent kind."""
    mixers = shape.num_attention_layers + shape.num_mamba_layers
    return max(mixers, shape.num_feed_forward_layers) if shape.num_ffn_layers else shape.num_layers


def model_of(shape: ModelShape) -> ModelConfig:
    """Return the model of a recipe's kind that saves for its backward pass about what one of a shape does."""
    # without a gate there are two matrices of three, and two numbers are saved of three
    width = 1 if shape.gated else 2 / 3
    layers = _num_layers(shape)
    latent = shape.kv_lora_rank > 0
    # latent attention computes keys and values of every head
    head_dim = (shape.query_dim + shape.value_dim) // 2 if latent else shape.head_dim
    pattern = "L" * (shape.global_every - 1) + "G" if shape.window and shape.global_every > 1 else (
        "L" if shape.window and shape.global_every == 1 and shape.num_window_layers else "G")
    return ModelConfig(
        family="", vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_layers=layers,
        num_heads=shape.num_heads, num_kv_heads=shape.num_heads if latent else shape.num_kv_heads,
        head_dim=head_dim, num_dense_layers=layers - shape.num_moe_layers if shape.num_experts else 0,
        # hybrids have mixers without a feed-forward network: one of a width that weighs nothing stands there
        dense_ffn_dim=round(shape.dense_ffn_dim * width) or 64, num_experts=shape.num_experts,
        num_experts_per_token=shape.num_experts_per_token,
        num_shared_experts=1 if shape.num_experts and 0 < shape.num_shared_experts < 1
        else round(shape.num_shared_experts),
        expert_ffn_dim=round(shape.expert_ffn_dim * width), attention_pattern=pattern,
        sliding_window_tokens=shape.window if "L" in pattern else 0, tied_embeddings=shape.tied,
        num_mtp_layers=shape.num_mtp_layers)


def _missing_params(shape: ModelShape, model: ModelConfig) -> tuple[int, int]:
    """Return how many weights a shape has more than the model that stands for it: outside of routed experts,
    and of these, those of a prediction layer, which recipes have none in."""
    count = num_params(model)
    experts = shape.num_mtp_layers * shape.num_experts * shape.block_params("expert") if shape.mtp_moe else 0
    more = shape.params() + shape.mtp_params(shape.num_experts) - count.total - count.mtp
    return more - experts, experts


def _with_weights(found: Account, w: Workload, dense: int, experts: int) -> Account:
    """Return an account with so many weights of the whole model more, spread evenly."""
    each = dense // (w.tp * w.pp) + experts // (w.ep * w.etp * w.pp)
    updated: float = each
    if w.sharding != "none":
        updated = dense / w.num_gpus + experts / w.num_gpus
    return replace(
        found, weights=max(0, found.weights + each * BF16_BYTES),
        gradients=max(0, found.gradients + each * w.grad_bytes),
        optimizer=max(0, found.optimizer + round(updated * STATE_BYTES * (1 - w.offload))))


def _sharded(found: Account, w: Workload) -> Account:
    """Return an account whose weights and gradients are shared as its optimizer is: each process keeps its
    part, and has whole layers for as long as they compute.  Experts, which `ep` and `etp` have cut before,
    are shared by as many processes less."""
    processes = w.sharding_group or w.num_gpus // (w.tp * w.pp)
    dense, experts = held_params(w)
    of_experts = max(1, processes * w.tp // (w.ep * w.etp))
    share = (dense / processes + experts / of_experts) / (dense + experts)
    layers = max(1, _num_layers(w.shape) // w.pp)
    whole = GATHERED_LAYERS * (found.weights + found.gradients) // layers
    # its optimizer was shared by all data-parallel processes
    spread = max(1, (w.num_gpus // (w.tp * w.pp)) // max(1, processes))
    return replace(found, weights=round(found.weights * share),
                   gradients=round(found.gradients * share) + whole, optimizer=found.optimizer * spread)


# Memory of the fullest GPU of a row's run, as if this framework ran it.


def peak_bytes(w: Workload) -> int:
    """Return the bytes; 0 where the row's sizes are none that the account can cut."""
    try:
        return account_of(w).total
    except (ArithmeticError, ValueError):  # a table may have any numbers
        return 0
