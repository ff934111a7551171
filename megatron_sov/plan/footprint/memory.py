"""Predict a training process's GPU memory by items: exact states (`states`), saved activations
(`activations`), quantized weights (`stage_parameters`), and estimated library buffers."""

from dataclasses import dataclass

from megatron_sov.model.config import DistillationConfig, RunConfig
from megatron_sov.model.config.lora import HEAD
from megatron_sov.model.process_memory import States
from megatron_sov.plan.footprint.activations import (
    count_head_gradient_bytes, estimate_saved, estimate_stored, list_layer_kinds)
from megatron_sov.plan.footprint.stage_parameters import (
    FLOAT32_BYTES, ITEM_BYTES, count_quantized_bytes, count_replaced_bytes)
from megatron_sov.plan.footprint.states import estimate_states

SIMPLE_BYTES = 4 << 20
"""Bytes per channel and peer: NCCL_BUFFSIZE (NCCL's user guide, "Environment variables")."""
LL_BYTES = 8 * 512 * 8 * 16
"""Bytes under protocol LL: 8 lines with 16 bytes for each of 512 threads, 8 steps (NCCL 2.2x,
`src/include/device.h`: NCCL_LL_LINES_PER_THREAD, NCCL_LL_MAX_NTHREADS, NCCL_STEPS)."""
LL128_BYTES = 120 * 640 * 8 * 8
"""Bytes under protocol LL128: 120 numbers with 8 bytes for each of 640 threads, 8 steps (`device.h`)."""
CHANNELS = 16
"""Channels per ring. NCCL opens 16 to 32 over NVLink and fewer over a network. Assumed."""
FRAGMENTATION_SHARE = 0.05
"""Allocator gaps as a share of activations, with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. Assumed;
without this setting, a tenth and more are common (GMLake, arXiv 2401.08156, figure 4)."""
PRODUCT_ROWS = 8192
"""Rows per product in the head's weight gradient (`engine.model.chunked_head`)."""
LOGIT_BYTES = 4
"""The softmax uses float32, or the model's dtype if it is wider."""
DISTILL = "distill"
MATRIX_ROUND = 1 << 24
"""Matrix elements per process in a round of Muon's exchange (`engine.optimizer.muon`)."""
ROUND_COPIES = 4
"""Sent, received, gathered and updated matrices."""
PASSING_COPIES = 3
"""Temporary copies per routed token: expert input and output in token order, and output in expert order."""


def count_communicators(config: RunConfig, num_ranks: int) -> int:
    """Count the NCCL communicators with several processes that a step with AdamW uses on a process
    (`megatron.core.parallel_state`, 0.19.2). Groups with equal members and purpose share a communicator
    (`engine.parallel.world.create_groups`)."""
    p, m, stage = config.parallel, config.model, num_ranks // config.parallel.pp
    # per axis: distance between neighbours, and size
    tp, cp, pp = (1, p.tp), (p.tp, p.cp), (stage, p.pp)
    dp = (p.tp * p.cp, stage // (p.tp * p.cp))
    groups = {("reductions", _merge_axes((1, num_ranks))), ("reductions", _merge_axes(cp, dp)),
              ("reductions", _merge_axes(dp)), ("layers", _merge_axes(tp)), ("layers", _merge_axes(cp)),
              ("stages", _merge_axes(pp))}
    norms: list[tuple[tuple[int, int], ...]] = [(tp, pp)]
    if m.num_moe_layers():
        etp, ep = (1, p.etp), (p.etp, p.ep)
        groups |= {("layers", _merge_axes(tp, cp)), ("experts", _merge_axes(ep)),
                   ("experts", _merge_axes(etp)), ("experts", _merge_axes(etp, ep)),
                   ("experts' gradients", _merge_axes((p.etp * p.ep, stage // (p.etp * p.ep))))}
        norms.append((etp, ep, pp))
    if not p.zero1:  # without ZeRO-1, norms are summed over the model-parallel processes
        groups |= {("reductions", _merge_axes(*axes)) for axes in norms}
    if p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers):
        groups.add(("reductions", _merge_axes((num_ranks - stage, 2))))
    return sum(members != () for _, members in groups)


def _merge_axes(*axes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Merge adjacent axes, so that equal process groups have equal keys."""
    merged: list[tuple[int, int]] = []
    for distance, size in axes:
        if merged and distance == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        elif size > 1:
            merged.append((distance, size))
    return tuple(merged)


def count_nccl_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return NCCL's buffer bytes: per communicator and channel, the buffers for three protocols."""
    return count_communicators(config, num_ranks) * CHANNELS * (SIMPLE_BYTES + LL_BYTES + LL128_BYTES)


@dataclass(frozen=True)
class MemoryAccount:
    """Predicted bytes on a process.

    Only the larger of `one_layer` and `head` counts: the head's backward pass frees its buffers before the
    last layer's backward pass starts.
    """

    weights: int
    """Weights, with the gaps in ZeRO-1's buffers."""
    gradients: int
    """Gradient buffers."""
    optimizer: int
    layer_inputs: int
    """Activations that pending micro-batches have stored."""
    one_layer: int
    """Activations and gradients in the current layer, and temporary copies of routed tokens."""
    head: int
    """Logits in a chunk, gradients from the loss's forward pass, and the head merged with its adapter."""
    quantized_weights: int = 0
    """Transformer Engine's 8- or 4-bit weight copies under `train.fp8`; under `train.fp8_weights` they
    replace bf16 weights."""
    on_host: int = 0
    """Host memory under `gpu.optimizer_offload`: master weights, moments, gradients; not in `total`."""
    counters: int = 0
    """Router counters and selection biases, YaRN angles."""
    update: int = 0
    """Temporary update buffers: float32 copies of bf16 gradients, Muon's matrices."""
    imbalance: int = 0
    """Additional activations on the fullest expert-parallel rank; an estimate."""
    angles: int = 0
    """Cosines and sines for rotary positions."""
    teacher: int = 0
    """The teacher's weights in rounds that learn distributions, in the model's layout."""
    nccl: int = 0
    """NCCL buffers; an estimate."""
    fragmentation: int = 0
    """Allocator gaps; an estimate."""

    def components(self) -> dict[str, int]:
        """Return item -> bytes at the peak; the sum is `total`."""
        smaller = "one_layer" if self.one_layer < self.head else "head"
        return {name: 0 if name == smaller else value for name, value in vars(self).items()
                if name != "on_host"}

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return sum(vars(self).values()) - self.on_host - min(self.one_layer, self.head)

    @property
    def allocated(self) -> int:
        """Peak bytes that torch allocates, without NCCL's buffers and the allocator's gaps."""
        return self.total - self.nccl - self.fragmentation

    @property
    def states(self) -> int:
        """Bytes allocated from step to step: weights in all formats, gradients, optimizer states."""
        return self.weights + self.quantized_weights + self.gradients + self.optimizer


def get_largest_imbalance(config: RunConfig) -> float:
    """Return the load of an expert-parallel process that gets every token, relative to the mean."""
    if not config.model.num_moe_layers():
        return 1.0
    num_local = config.model.num_experts // config.parallel.ep
    return config.parallel.ep * min(1.0, num_local / config.model.num_experts_per_token)


def build_account(config: RunConfig, num_ranks: int, stage: int, seq_len: int,
                  imbalance: float | None = None) -> MemoryAccount:
    """Predict the memory on the fullest process on pipeline stage `stage` (0-based); the layout must be valid
    for `num_ranks`. `imbalance`: tokens on the fullest expert-parallel rank divided by the mean; None:
    `gpu.expert_imbalance`, or all tokens if that is less."""
    p, train, m = config.parallel, config.train, config.model
    states = estimate_states(config, num_ranks, stage)
    replicas = max(1, num_ranks // p.ranks_per_replica)
    micro_batches = max(1, train.global_batch_size // (replicas * train.micro_batch_size))
    saved = estimate_stored(config, stage, seq_len, micro_batches)
    row = seq_len * train.micro_batch_size
    passing = PASSING_COPIES * max(estimate_saved(config, row, kind).expert_input
                                   for kind in set(list_layer_kinds(m)))
    one_layer = saved.largest + saved.recomputed + passing
    head = _count_head_bytes(config, row // p.cp, row) if stage == p.pp - 1 else 0
    if imbalance is None:
        imbalance = min(config.gpu.expert_imbalance, get_largest_imbalance(config))
    excess = imbalance - 1 if p.ep > 1 else 0.0
    waiting_excess = min(excess, config.gpu.expert_spill - 1) if config.gpu.expert_spill else excess
    # Without recomputation, `saved.waiting` contains the current layer, except its spilled activations.
    layer_excess = excess if saved.recomputed else excess - waiting_excess
    in_layer = int(excess * passing + layer_excess * saved.layer_unevenly)
    # If the head is the peak, imbalance in a layer counts only above the head.
    uneven = int(waiting_excess * saved.unevenly) + max(one_layer + in_layer, head) - max(one_layer, head)
    moving = saved.waiting + max(one_layer, head) + uneven
    return MemoryAccount(
        weights=states.weights - count_replaced_bytes(config, stage, states.elements),
        gradients=states.gradients, optimizer=states.optimizer,
        on_host=states.on_host, counters=states.counters, update=_count_update_bytes(config, states),
        layer_inputs=saved.waiting, one_layer=one_layer, head=head, imbalance=uneven,
        quantized_weights=count_quantized_bytes(config, stage),
        angles=2 * row * m.rotated_channels() * m.rotates() * FLOAT32_BYTES,
        nccl=count_nccl_bytes(config, num_ranks), fragmentation=int(FRAGMENTATION_SHARE * moving))


def _count_update_bytes(config: RunConfig, states: States) -> int:
    """Return the temporary buffer bytes during an optimizer step (`MemoryAccount.update`)."""
    bf16_sums = config.train.precision == "bf16" and config.gpu.grad_dtype == "bf16"
    num_bytes = states.updated * FLOAT32_BYTES if bf16_sums else 0
    if "muon" in (config.optim.name, *(group.optimizer for group in config.optim.groups)):
        num_bytes += ROUND_COPIES * MATRIX_ROUND * ITEM_BYTES[config.train.precision]
    return num_bytes


def _count_head_bytes(config: RunConfig, local_tokens: int, row_tokens: int) -> int:
    """Return the output head's bytes while a micro-batch's loss runs (`MemoryAccount.head`)."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    # float32 logits become the softmax and then the gradient in place; products need a bf16 copy
    logit_bytes = item if item >= LOGIT_BYTES else LOGIT_BYTES + item
    if config.objective.name == DISTILL:
        logit_bytes = _count_divergence_buffers(config.distillation) * max(item, LOGIT_BYTES)
    if m.logits_softcap is not None:
        logit_bytes += max(item, LOGIT_BYTES)  # the cap's derivative
    chunk = min(config.train.head_chunk_tokens, local_tokens) * logit_bytes
    adapts_head = config.lora.on and HEAD in config.lora.targets
    copy = m.hidden_size * item if adapts_head else 0  # the head merged with its adapter
    rows = -(-m.vocab_size // config.parallel.tp)
    # A trained head also needs weighted hidden states, and in bf16 their copy and an unsummed product.
    product = 0
    if adapts_head or not config.lora.on:
        weighted = max(item, LOGIT_BYTES) + (item if item < LOGIT_BYTES else 0)
        added = min(rows, PRODUCT_ROWS) * FLOAT32_BYTES if item < FLOAT32_BYTES else 0
        product = m.hidden_size * (min(config.train.head_chunk_tokens, local_tokens) * weighted + added)
    return rows * (chunk + copy) + product + count_head_gradient_bytes(config, row_tokens)


def _count_divergence_buffers(distillation: DistillationConfig) -> int:
    """Return the maximum number of logit-sized buffers per chunk in `engine.model.divergence`."""
    if distillation.top_k:
        return 3  # the student's log-probabilities and probabilities, and the product
    # both models' log-probabilities and probabilities; for mixtures also the mixture, and a difference
    return 6 if 0 < distillation.beta < 1 else 4
