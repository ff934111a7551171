"""Memory of one process while it trains, as an account of single items: weights, gradients and optimizer to
the byte (`states`), activations by what modules save (`activations`), Transformer Engine's quantised weights
(`held`), and estimates of what the libraries take besides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_sov.model.config import (
    DistillationConfig, GpuConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.gpu import RecomputeModule
from megatron_sov.model.config.lora import HEAD
from megatron_sov.model.families.count import num_params
from megatron_sov.plan.footprint.activations import head_keeps, kinds, saved, stored
from megatron_sov.plan.footprint.held import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, quantized_weight_bytes, without_bf16)
from megatron_sov.plan.footprint.states import States, states_of
from megatron_sov.plan.speed.traffic import held_params
from megatron_sov.plan.speed.workload import PRECISIONS, ModelShape, Workload

# What a process's GPU holds beside a model, its training and its activations: estimates, each by a
# formula with its source.


SIMPLE_BYTES = 4 << 20
"""Buffer of a channel to one peer: NCCL_BUFFSIZE (NCCL's user guide, "Environment variables")."""
LL_BYTES = 8 * 512 * 8 * 16
"""The same of its protocol LL: 8 lines of 16 bytes for each of 512 threads, 8 steps (NCCL 2.2x,
`src/include/device.h`: NCCL_LL_LINES_PER_THREAD, NCCL_LL_MAX_NTHREADS, NCCL_STEPS)."""
LL128_BYTES = 120 * 640 * 8 * 8
"""And of LL128: 120 numbers of 8 bytes for each of 640 threads, 8 steps (the same file)."""
CHANNELS = 16
"""Channels of a communicator's ring.  NCCL opens 16 to 32 over NVLink and fewer over a network; the smaller
number for all.  Ours."""
EXPECTED_IMBALANCE = 1.2
"""Tokens of the fullest expert-parallel rank in units of the mean, where a bias balances experts: they are
seldom further off than that behind the first hundreds of steps.  Ours; `plan` takes another one."""
FRAGMENTATION_SHARE = 0.05
"""Part of what comes and goes in a micro-batch that torch's allocator holds in gaps besides.  Ours: with
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; without it gaps of a tenth and more are common
(GMLake, arXiv 2401.08156, figure 4)."""


def communicators(config: RunConfig, num_ranks: int) -> int:
    """Return how many NCCL communicators of more than one process a process is in.

    Those that a step with AdamW uses (`megatron.core.parallel_state`, 0.16.1), one for groups of the same
    members that serve the same (`engine.parallel.world.make_groups`).
    """
    p, m, stage = config.parallel, config.model, num_ranks // config.parallel.pp
    # of each axis the distance of neighbours and their number
    tp, cp, pp = (1, p.tp), (p.tp, p.cp), (stage, p.pp)
    dp = (p.tp * p.cp, stage // (p.tp * p.cp))
    used = {("reductions", _members((1, num_ranks))), ("reductions", _members(cp, dp)),
            ("reductions", _members(dp)), ("layers", _members(tp)), ("layers", _members(cp)),
            ("stages", _members(pp))}
    norms: list[tuple[tuple[int, int], ...]] = [(tp, pp)]
    if m.num_moe_layers():
        etp, ep = (1, p.etp), (p.etp, p.ep)
        used |= {("layers", _members(tp, cp)), ("experts", _members(ep)), ("experts", _members(etp)),
                 ("experts", _members(etp, ep)),
                 ("experts' gradients", _members((p.etp * p.ep, stage // (p.etp * p.ep))))}
        norms.append((etp, ep, pp))
    if not p.zero1:  # whose norms are summed over all processes
        used |= {("reductions", _members(*axes)) for axes in norms}
    if p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers):
        used.add(("reductions", _members((num_ranks - stage, 2))))
    return sum(members != () for _, members in used)


def _members(*axes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the axes, from the nearest neighbours to the farthest, as few as describe the same processes."""
    found: list[tuple[int, int]] = []
    for distance, size in axes:
        if found and distance == found[-1][0] * found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] * size)
        elif size > 1:
            found.append((distance, size))
    return tuple(found)


def nccl_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return the bytes of NCCL's buffers: of each communicator a ring's channels, each with buffers of three
    protocols from the peer before."""
    return communicators(config, num_ranks) * CHANNELS * (SIMPLE_BYTES + LL_BYTES + LL128_BYTES)


ROWS_OF_PRODUCT = 8192
"""Rows of the head's gradient that are multiplied at a time (`engine.model.chunked_head`)."""
LOGIT_BYTES = 4
"""A softmax is computed in float32, or in the model's dtype where that is wider."""
DISTILL = "distill"
"""The objective that compares two distributions over the vocabulary."""
MATRIX_ROUND = 1 << 24
"""Elements of whole matrices that a process has in a round of Muon's exchange
(`engine.optimizer.muon`)."""
ROUND_COPIES = 4
"""Sent, received, whole and updated ones."""
PASSING_COPIES = 3
"""Of each routed token while its layer is computed, beside what its expert saves: before and behind the
experts in the order of tokens, and behind them in theirs."""


@dataclass(frozen=True)
class Account:
    """Bytes of one process.

    Of `one_layer` and `head` the larger counts: the head's backward pass lets go what it took before that of
    the last layer begins, and no layer is computed again before then.
    """

    weights: int
    """With the gaps of ZeRO-1's buffers."""
    gradients: int
    """The buffers in which they are summed."""
    optimizer: int
    layer_inputs: int
    """Kept for the backward pass by each layer and micro-batch under way: its input, or more."""
    one_layer: int
    """The inside of the layer that is being computed again, the gradients of as much, and copies of routed
    tokens that pass."""
    head: int
    """Logits of one chunk, the head's gradients that a loss leaves in its forward pass, and the head with its
    adapter inside."""
    quantized_weights: int = 0
    """What Transformer Engine keeps of weights in 8 or 4 bits under `train.fp8`, beside `weights` or, under
    `train.fp8_weights`, in their place."""
    on_host: int = 0
    """In the host's memory, under `gpu.optimizer_offload`: masters, moments and gradients; in no total."""
    counters: int = 0
    """Routers' counters and selection biases, YaRN's angles."""
    update: int = 0
    """While weights are updated: gradients in float32 where they are summed in bf16, Muon's matrices."""
    imbalance: int = 0
    """What routed experts keep more on the fullest expert-parallel rank than on an average one; an
    estimate."""
    angles: int = 0
    teacher: int = 0
    """Weights of the teacher of rounds that learn distributions: it lies beside the model, at its layout."""
    nccl: int = 0
    """Buffers of the communication library; an estimate."""
    fragmentation: int = 0
    """Gaps of the allocator; an estimate."""

    def components(self) -> dict[str, int]:
        """Return what the device holds at its peak, by name; adds up to `total`."""
        smaller = "one_layer" if self.one_layer < self.head else "head"
        return {name: 0 if name == smaller else value for name, value in vars(self).items()
                if name != "on_host"}

    @property
    def total(self) -> int:
        """All of it that the device holds at its peak."""
        return sum(vars(self).values()) - self.on_host - min(self.one_layer, self.head)

    @property
    def allocated(self) -> int:
        """What torch allocates at its peak: all but NCCL's buffers and the allocator's gaps."""
        return self.total - self.nccl - self.fragmentation

    @property
    def states(self) -> int:
        """What stays from step to step: weights in all their forms, gradients, optimizer."""
        return self.weights + self.quantized_weights + self.gradients + self.optimizer


def account(config: RunConfig, num_ranks: int, stage: int, seq_len: int,
            imbalance: float = EXPECTED_IMBALANCE) -> Account:
    """Return the account of the fullest process on pipeline stage `stage` (0-based).

    Args:
        config: model, layout, precision, recomputation, use of GPUs.
        num_ranks: processes; the layout has to fit them.
        stage: pipeline stage.
        seq_len: tokens of a sample.
        imbalance: tokens of the fullest expert-parallel rank in units of the mean.
    """
    p, train, m = config.parallel, config.train, config.model
    states = states_of(config, num_ranks, stage)
    replicas = max(1, num_ranks // p.ranks_per_replica)
    micro_batches = max(1, train.global_batch_size // (replicas * train.micro_batch_size))
    waits = stored(config, stage, seq_len, micro_batches)
    row = seq_len * train.micro_batch_size
    passing = PASSING_COPIES * max(saved(config, row, kind).expert_input for kind in set(kinds(m)))
    # the layer whose gradients are being computed, and what of it is there anew
    one_layer = waits.largest + waits.recomputed + passing
    head = _head_bytes(config, row // p.cp, row) if stage == p.pp - 1 else 0
    more = imbalance - 1 if p.ep > 1 else 0.0
    # where the head is the peak, a layer's tokens may be uneven as long as it stays below
    uneven = (int(more * waits.unevenly) + max(one_layer + int(more * (waits.layer_unevenly + passing)), head)
              - max(one_layer, head))
    moving = waits.waiting + max(one_layer, head) + uneven
    return Account(
        weights=states.weights - without_bf16(config, stage, states.elements),
        gradients=states.gradients, optimizer=states.optimizer,
        on_host=states.on_host, counters=states.counters, update=_update_bytes(config, states),
        layer_inputs=waits.waiting, one_layer=one_layer, head=head, imbalance=uneven,
        quantized_weights=quantized_weight_bytes(config, stage),
        angles=2 * row * m.rotated_channels() * m.rotates() * FLOAT32_BYTES,
        nccl=nccl_bytes(config, num_ranks), fragmentation=int(FRAGMENTATION_SHARE * moving))


def _update_bytes(config: RunConfig, states: States) -> int:
    """Return what an update of the weights takes for as long as it lasts."""
    bf16_sums = config.train.precision == "bf16" and config.gpu.grad_dtype == "bf16"
    muon = "muon" in (config.optim.name, *(group.optimizer for group in config.optim.groups))
    return ((states.updated * FLOAT32_BYTES if bf16_sums else 0)
            + (ROUND_COPIES * MATRIX_ROUND * ITEM_BYTES[config.train.precision] if muon else 0))


def _head_bytes(config: RunConfig, local_tokens: int, row_tokens: int) -> int:
    """Return what the output head takes while a micro-batch's loss is computed."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    # float32 logits become the softmax and then their gradient in place; products take bf16, which is a copy,
    # and are summed in float32
    logit_bytes = item if item >= LOGIT_BYTES else LOGIT_BYTES + item
    if config.objective.name == DISTILL:
        logit_bytes = _divergence_buffers(config.distillation) * max(item, LOGIT_BYTES)
    if m.logits_softcap is not None:
        logit_bytes += max(item, LOGIT_BYTES)  # the slope of the cap
    chunk = min(config.train.head_chunk_tokens, local_tokens) * logit_bytes
    adapts_head = config.lora.on and HEAD in config.lora.targets
    copy = m.hidden_size * item if adapts_head else 0  # the head with its adapter inside
    rows = -(-m.vocab_size // config.parallel.tp)
    # beside the logits, where the head learns: states times their weights, and in bf16 a copy of them and a
    # product before it is added
    product = 0
    if adapts_head or not config.lora.on:
        weighted = max(item, LOGIT_BYTES) + (item if item < LOGIT_BYTES else 0)
        added = min(rows, ROWS_OF_PRODUCT) * FLOAT32_BYTES if item < FLOAT32_BYTES else 0
        product = m.hidden_size * (min(config.train.head_chunk_tokens, local_tokens) * weighted + added)
    return rows * (chunk + copy) + product + head_keeps(config, row_tokens)


def _divergence_buffers(distillation: DistillationConfig) -> int:
    """Return how many times a chunk of logits is there at most while `engine.model.divergence` compares."""
    if distillation.top_k:
        return 3  # the student's log-probabilities, its probabilities, and their product
    # the log-probabilities and probabilities of both; beside a mixture also that, and a difference
    return 6 if 0 < distillation.beta < 1 else 4


FP8: dict[str, Any] = {precision: fp8 for fp8, precision in reversed(PRECISIONS.items())}
"""Precision of a workload -> the first `train.fp8` that computes in it."""
# The account of a step that no recipe describes: of `Workload`, whose model may be a row of a table.  It is
# that of the nearest model that a recipe could have, with the weights that this one has more or less.

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
    each, longer = divmod(layers, runs)
    return (each + 1,) * longer + (each,) * (runs - longer)


def _num_layers(shape: ModelShape) -> int:
    """Return layers that have attention or a Mamba block, and a feed-forward network; in models whose layers
    are one block each, as many as there are of the more frequent kind."""
    mixers = shape.num_attention_layers + shape.num_linear_layers + shape.num_mamba_layers
    return max(mixers, shape.num_feed_forward_layers) if shape.num_ffn_layers else shape.num_layers


def model_of(shape: ModelShape) -> ModelConfig:
    """Return the model of a recipe's kind that saves for its backward pass about what one of a shape does."""
    # without a gate there are two matrices of three, and two numbers are saved of three
    width = 1 if shape.gated else 2 / 3
    layers = _num_layers(shape)
    latent = shape.kv_lora_rank > 0
    # latent attention computes keys and values of every head
    head_dim = (shape.query_dim + shape.value_dim) // 2 if latent else shape.head_dim
    pattern = "G"
    if shape.window and shape.global_every > 1:
        pattern = "L" * (shape.global_every - 1) + "G"
    elif shape.window and shape.global_every == 1 and shape.num_window_layers:
        pattern = "L"
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
        num_mtp_layers=shape.num_mtp_layers, mtp_depths=shape.mtp_depths if shape.num_mtp_layers else 1)


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
