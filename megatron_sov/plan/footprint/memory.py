"""Memory of one process while it trains, as an account of single items: weights, gradients and optimizer to
the byte (`states`), activations by what modules save (`activations`), Transformer Engine's quantised weights
(`held`), and estimates of what the libraries take besides.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.model.config import DistillationConfig, RunConfig
from megatron_sov.model.config.lora import HEAD
from megatron_sov.model.process_memory import States
from megatron_sov.plan.footprint.activations import (
    count_head_gradient_bytes, estimate_saved, estimate_stored, list_layer_kinds)
from megatron_sov.plan.footprint.stage_parameters import (
    FLOAT32_BYTES, ITEM_BYTES, count_quantized_bytes, count_replaced_bytes)
from megatron_sov.plan.footprint.states import estimate_states

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


def count_communicators(config: RunConfig, num_ranks: int) -> int:
    """Return how many NCCL communicators of more than one process a process is in.

    Those that a step with AdamW uses (`megatron.core.parallel_state`, 0.19.2), one for groups of the same
    members that serve the same (`engine.parallel.world.make_groups`).
    """
    p, m, stage = config.parallel, config.model, num_ranks // config.parallel.pp
    # of each axis the distance of neighbours and their number
    tp, cp, pp = (1, p.tp), (p.tp, p.cp), (stage, p.pp)
    dp = (p.tp * p.cp, stage // (p.tp * p.cp))
    used = {("reductions", _merge_axes((1, num_ranks))), ("reductions", _merge_axes(cp, dp)),
            ("reductions", _merge_axes(dp)), ("layers", _merge_axes(tp)), ("layers", _merge_axes(cp)),
            ("stages", _merge_axes(pp))}
    norms: list[tuple[tuple[int, int], ...]] = [(tp, pp)]
    if m.num_moe_layers():
        etp, ep = (1, p.etp), (p.etp, p.ep)
        used |= {("layers", _merge_axes(tp, cp)), ("experts", _merge_axes(ep)), ("experts", _merge_axes(etp)),
                 ("experts", _merge_axes(etp, ep)),
                 ("experts' gradients", _merge_axes((p.etp * p.ep, stage // (p.etp * p.ep))))}
        norms.append((etp, ep, pp))
    if not p.zero1:  # whose norms are summed over all processes
        used |= {("reductions", _merge_axes(*axes)) for axes in norms}
    if p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers):
        used.add(("reductions", _merge_axes((num_ranks - stage, 2))))
    return sum(members != () for _, members in used)


def _merge_axes(*axes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the axes, from the nearest neighbours to the farthest, as few as describe the same processes."""
    found: list[tuple[int, int]] = []
    for distance, size in axes:
        if found and distance == found[-1][0] * found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] * size)
        elif size > 1:
            found.append((distance, size))
    return tuple(found)


def count_nccl_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return the bytes of NCCL's buffers: of each communicator a ring's channels, each with buffers of three
    protocols from the peer before."""
    return count_communicators(config, num_ranks) * CHANNELS * (SIMPLE_BYTES + LL_BYTES + LL128_BYTES)


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
class MemoryAccount:
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


def build_account(config: RunConfig, num_ranks: int, stage: int, seq_len: int,
            imbalance: float = EXPECTED_IMBALANCE) -> MemoryAccount:
    """Return the account of the fullest process on pipeline stage `stage` (0-based).

    Args:
        config: model, layout, precision, recomputation, use of GPUs.
        num_ranks: processes; the layout has to fit them.
        stage: pipeline stage.
        seq_len: tokens of a sample.
        imbalance: tokens of the fullest expert-parallel rank in units of the mean.
    """
    p, train, m = config.parallel, config.train, config.model
    states = estimate_states(config, num_ranks, stage)
    replicas = max(1, num_ranks // p.ranks_per_replica)
    micro_batches = max(1, train.global_batch_size // (replicas * train.micro_batch_size))
    waits = estimate_stored(config, stage, seq_len, micro_batches)
    row = seq_len * train.micro_batch_size
    passing = PASSING_COPIES * \
        max(estimate_saved(config, row, kind).expert_input for kind in set(list_layer_kinds(m)))
    # the layer whose gradients are being computed, and what of it is there anew
    one_layer = waits.largest + waits.recomputed + passing
    head = _count_head_bytes(config, row // p.cp, row) if stage == p.pp - 1 else 0
    more = imbalance - 1 if p.ep > 1 else 0.0
    # where the head is the peak, a layer's tokens may be uneven as long as it stays below
    uneven = (int(more * waits.unevenly) + max(one_layer + int(more * (waits.layer_unevenly + passing)), head)
              - max(one_layer, head))
    moving = waits.waiting + max(one_layer, head) + uneven
    return MemoryAccount(
        weights=states.weights - count_replaced_bytes(config, stage, states.elements),
        gradients=states.gradients, optimizer=states.optimizer,
        on_host=states.on_host, counters=states.counters, update=_count_update_bytes(config, states),
        layer_inputs=waits.waiting, one_layer=one_layer, head=head, imbalance=uneven,
        quantized_weights=count_quantized_bytes(config, stage),
        angles=2 * row * m.rotated_channels() * m.rotates() * FLOAT32_BYTES,
        nccl=count_nccl_bytes(config, num_ranks), fragmentation=int(FRAGMENTATION_SHARE * moving))


def _count_update_bytes(config: RunConfig, states: States) -> int:
    """Return what an update of the weights takes for as long as it lasts."""
    bf16_sums = config.train.precision == "bf16" and config.gpu.grad_dtype == "bf16"
    muon = "muon" in (config.optim.name, *(group.optimizer for group in config.optim.groups))
    return ((states.updated * FLOAT32_BYTES if bf16_sums else 0)
            + (ROUND_COPIES * MATRIX_ROUND * ITEM_BYTES[config.train.precision] if muon else 0))


def _count_head_bytes(config: RunConfig, local_tokens: int, row_tokens: int) -> int:
    """Return what the output head takes while a micro-batch's loss is computed."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    # float32 logits become the softmax and then their gradient in place; products take bf16, which is a copy,
    # and are summed in float32
    logit_bytes = item if item >= LOGIT_BYTES else LOGIT_BYTES + item
    if config.objective.name == DISTILL:
        logit_bytes = _count_divergence_buffers(config.distillation) * max(item, LOGIT_BYTES)
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
    return rows * (chunk + copy) + product + count_head_gradient_bytes(config, row_tokens)


def _count_divergence_buffers(distillation: DistillationConfig) -> int:
    """Return how many times a chunk of logits is there at most while `engine.model.divergence` compares."""
    if distillation.top_k:
        return 3  # the student's log-probabilities, its probabilities, and their product
    # the log-probabilities and probabilities of both; beside a mixture also that, and a difference
    return 6 if 0 < distillation.beta < 1 else 4
