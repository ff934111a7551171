"""Count a GPU's matrix products, memory traffic and messages per step, with megatron-core's sharding.

A product is [tokens, n] = [tokens, k] x [k, n]; the backward pass has two equally large products, for the
gradients of input and weight.

Messages have the volume of ring algorithms: in an all-gather or reduce-scatter over n processes, a process
sends (n - 1) / n of the tensor. Tensor and sequence parallelism: arXiv 2205.05198, section 4.2.2; sharding:
ZeRO, arXiv 1910.02054, section 7; experts: a token copy per visited rank or NVLink domain.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_sov.model.families.count import compute_mean_keys
from megatron_sov.plan.footprint.activations import DELTA_RULE_CHUNK
from megatron_sov.plan.footprint.stage_parameters import FLOAT32_BYTES
from megatron_sov.plan.speed.workload import Block, Workload

ATTENTION_BACKWARD = 2.5
"""Flash attention's backward FLOPs relative to its forward FLOPs: five products instead of two
(arXiv 2205.14135, appendix B)."""
NUMBER_BYTES = 2
NORM, RESIDUAL = 2, 3
"""Memory passes: a norm reads and writes; a residual sum reads two tensors and writes one."""
LOGIT_BYTES = 14
"""Bytes per logit, forward and backward: written in bf16, read for the maximum, read and written for the
exponentials, read and written for the gradient in 4 or 2 bytes."""
SCORE_BYTES = 24
"""Bytes per router score: logits, scores, selected scores and map, in float32."""
PERMUTED = {"alltoall": 8, "allgather": 6, "deepep": 4, "hybridep": 4}
"""Dispatcher -> memory passes per routed token around the experts' products."""
MAMBA_PASSES = 20
"""Memory passes over the inner width: convolution, scan (float32 chunk states), gate and norm."""
SCAN_CHUNK = 128
"""Tokens per chunk in the scan (arXiv 2405.21060, section 6)."""
Group = Literal["tp", "ep", "cp", "pp", "dp", "edp"]
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Product:
    """A matrix product on one GPU; grouped: one product per expert."""

    tokens: float
    n: float
    k: float
    """Inner dimension."""
    groups: float = 1
    """Local experts."""
    quantized: bool = True
    """Whether the product uses `Workload.precision`; routers and heads use bf16."""
    part: str = ""
    """Name in `gpu.recompute_modules` (mla_up_proj, mlp, moe, shared_experts), `HEAD`, or empty."""

    @property
    def flops(self) -> float:
        return 2 * self.tokens * self.n * self.k


def count_local_tokens(w: Workload) -> float:
    """Return the tokens per micro-batch in a GPU's products: `micro_batch_size` x `seq_len` / `cp`."""
    return w.micro_batch_size * w.seq_len / w.cp


def list_products(w: Workload, block: Block) -> list[Product]:
    """Return a block's products on a GPU; for routed experts, on the fullest GPU."""
    # Experts have their own process grid: etp splits them, ep distributes them.
    tokens, cut, groups = count_local_tokens(w), w.tp, 1.0
    if block == "expert":
        tokens, cut, groups = count_expert_rows(w), w.etp, w.shape.num_experts / w.ep
    return [Product(tokens=tokens / w.tp if matrix.cut == "tokens" else tokens,
                    n=matrix.rows / cut if matrix.cut == "rows" else matrix.rows,
                    k=matrix.columns / cut if matrix.cut == "columns" else matrix.columns, groups=groups,
                    quantized=matrix.quantized, part=matrix.part) for matrix in w.shape.list_matrices(block)]


def count_expert_rows(w: Workload) -> float:
    return count_local_tokens(w) / w.tp * w.etp * w.shape.num_experts_per_token * w.imbalance


def count_attention_flops(w: Workload, window: int) -> float:
    """Return the forward FLOPs in causal attention per layer; `window` in keys (0: none)."""
    s = w.shape
    # Attention in packed rows stays inside documents.
    keys = compute_mean_keys(min(w.document_tokens or w.seq_len, w.seq_len), window)
    return 2 * count_local_tokens(w) * keys * s.num_heads / w.tp * (s.query_dim + s.value_dim)


# Memory traffic in bytes: memory-bound kernels in a micro-batch's forward pass.


def _count_residual_bytes(w: Workload) -> float:
    # Sequence parallelism splits norms and residuals by tokens.
    tokens = count_local_tokens(w) / (w.tp if w.sp else 1)
    return (NORM * w.shape.norms_per_block + RESIDUAL) * tokens * w.shape.hidden_size * NUMBER_BYTES


def count_attention_bytes(w: Workload) -> float:
    """Return an attention block's traffic: norm, rotation, residual."""
    s = w.shape
    kv_heads = s.num_heads if s.kv_lora_rank else s.num_kv_heads
    rotated = (s.num_heads + kv_heads) * s.query_dim / w.tp
    # Latent attention copies queries and keys again to concatenate their parts.
    copies = 4 if s.kv_lora_rank else 2
    return _count_residual_bytes(w) + copies * count_local_tokens(w) * rotated * NUMBER_BYTES


def count_mamba_bytes(w: Workload) -> float:
    inner = w.shape.mamba_num_heads * w.shape.mamba_head_dim / w.tp
    return _count_residual_bytes(w) + MAMBA_PASSES * count_local_tokens(w) * inner * NUMBER_BYTES


def count_mamba_scan_flops(w: Workload) -> float:
    """Return the forward FLOPs in a Mamba-2 chunked scan (arXiv 2405.21060, section 6)."""
    s = w.shape
    inner = s.mamba_num_heads * s.mamba_head_dim
    per_token = 2 * SCAN_CHUNK * (s.mamba_num_groups * s.mamba_state_dim + inner)
    return count_local_tokens(w) / w.tp * (per_token + 4 * inner * s.mamba_state_dim)


def count_linear_bytes(w: Workload) -> float:
    """Return a linear attention block's traffic: norm, convolution, scan, gate, residual."""
    assert w.shape.linear is not None
    values = w.shape.linear.num_value_heads * w.shape.linear.value_head_dim / w.tp
    return _count_residual_bytes(w) + MAMBA_PASSES * count_local_tokens(w) * values * NUMBER_BYTES


def count_linear_scan_flops(w: Workload) -> float:
    """Return the forward FLOPs in the chunked delta rule: products inside a chunk and with the state, and the
    triangular system (arXiv 2406.06484, section 3.2). Not measured."""
    linear = w.shape.linear
    assert linear is not None
    keys, values = linear.key_head_dim, linear.value_head_dim
    within = 2 * DELTA_RULE_CHUNK * (2 * keys + values + (keys + values) / 2)
    return count_local_tokens(w) / w.tp * linear.num_value_heads * (within + 6 * keys * values)


def count_dense_bytes(w: Workload) -> float:
    """Return a dense feed-forward block's traffic: norm, activation, residual."""
    activation = _count_activation_bytes(w, count_local_tokens(w), w.shape.dense_ffn_dim / w.tp)
    return _count_residual_bytes(w) + activation


def count_activation_bytes(w: Workload) -> float:
    s = w.shape
    return _count_activation_bytes(w, count_expert_rows(w), s.expert_ffn_dim / w.etp)


def count_moe_bytes(w: Workload) -> float:
    """Return an MoE block's traffic without `count_activation_bytes`: norm, router, token permutation, shared
    experts' activation, residual."""
    s, local = w.shape, count_local_tokens(w) / w.tp
    sorted_bytes = (PERMUTED[w.dispatcher] * local * w.etp * s.num_experts_per_token * w.imbalance
                    * s.expert_width * NUMBER_BYTES)
    shared = _count_activation_bytes(w, count_local_tokens(w), s.num_shared_experts * s.expert_ffn_dim / w.tp)
    return _count_residual_bytes(w) + count_score_bytes(w) + sorted_bytes + shared


def count_score_bytes(w: Workload) -> float:
    """Return the router scores' traffic."""
    return count_local_tokens(w) / w.tp * w.shape.num_experts * SCORE_BYTES


def count_head_bytes(w: Workload) -> float:
    """Return the logits' traffic, forward and backward."""
    return count_local_tokens(w) * w.shape.vocab_size / w.tp * LOGIT_BYTES


def count_quantized_bytes(products: Iterable[Product], frozen: bool) -> float:
    """Return the traffic to quantize operands, forward and backward: inputs and output gradients are read in
    bf16 and written rowwise and columnwise; for frozen weights only rowwise."""
    factor = 3 if frozen else 4
    return sum(factor * (p.tokens * p.k + p.tokens * p.n) for p in products if p.quantized)


def count_adapter_bytes(products: Iterable[Product]) -> float:
    """Return the adapters' forward traffic: read the input, read and write the product's output."""
    return sum((p.tokens * p.k + 2 * p.tokens * p.n) * NUMBER_BYTES for p in products)


def _count_activation_bytes(w: Workload, rows: float, width: float) -> float:
    """Return an activation's traffic: read all inputs, write the output."""
    return w.shape.ffn_matrices * rows * width * NUMBER_BYTES


@dataclass(frozen=True)
class TrafficMessage:
    group: Group
    """Tensor, expert, context, pipeline or data parallelism (`edp`: routed experts)."""
    num_bytes: float
    """Bytes sent per step."""
    inside_share: float
    """Share inside an NVLink domain."""
    bytes_per_s: float
    """Peak rate on the limiting links."""
    count: float
    """Messages, each with `latency_s`."""
    latency_s: float

    @property
    def link(self) -> Literal["inside", "between"]:
        return "inside" if self.inside_share >= 1 else "between"


def list_messages(w: Workload) -> tuple[TrafficMessage, ...]:
    """Return a GPU's messages per step on a middle stage; groups with a single process have none."""
    messages = [build_tensor_message(w), build_expert_message(w), build_context_message(w),
                build_pipeline_message(w), *build_data_messages(w)]
    return tuple(m for m in messages if m.num_bytes)


def gathers_per_micro_batch(w: Workload) -> bool:
    """Return whether each micro-batch gathers the sharded weights; a pipeline gathers them once."""
    return w.sharding == "fsdp" and w.pp == 1


def count_passes(w: Workload, module: str = "") -> float:
    """Return the message passes per micro-batch: forward, backward and recomputation."""
    recomputes = w.recompute == "full" or (w.recompute == "selective" and module in w.recompute_modules)
    return 3 if recomputes else 2


def build_tensor_message(w: Workload) -> TrafficMessage:
    """Return the all-gathers and reduce-scatters around attention and dense feed-forward blocks."""
    s, tp = w.shape, w.tp
    blocks = s.num_attention_layers + s.num_linear_layers + s.num_mamba_layers
    blocks += s.num_feed_forward_layers - s.num_moe_layers + (s.num_moe_layers if s.num_shared_experts else 0)
    blocks += 2 * s.num_predictions
    # gather and scatter in both passes; under sp another gather for the weight gradient
    pairs = 2 * count_passes(w) + (1 if w.sp and w.objective == "train" else 0)
    # operands of quantized products may be gathered in 8 bits
    item = ACTIVATION_BYTES if w.precision == "bf16" or not w.overlap_tp else 1.5
    activations = count_local_tokens(w) * s.hidden_size * item
    volume = blocks / w.pp * pairs * activations * (tp - 1) / tp * w.num_micro_batches
    count = 0 if tp == 1 else blocks / w.pp * pairs * w.num_micro_batches
    return _build_ring_message("tp", w, volume=volume, count=count, size=tp, stride=1)


def build_expert_message(w: Workload) -> TrafficMessage:
    """Return dispatch and combine, forward and backward. If `etp` splits an expert, its processes all have
    its tokens: `alltoall` gathers between these processes (`token_dispatcher` in megatron-core 0.19.2),
    further dispatchers send a copy to each process."""
    s, size, choices = w.shape, w.ep * w.etp, w.shape.num_experts_per_token
    moe = s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    if not moe or size == 1:
        return TrafficMessage("ep", 0, inside_share=1, bytes_per_s=1, count=0, latency_s=0)
    times = moe / w.pp * 2 * count_passes(w, "moe") * w.num_micro_batches
    token_bytes = count_local_tokens(w) / w.tp * s.expert_width * ACTIVATION_BYTES * w.imbalance
    # Fractional: a group slightly larger than a domain has few partners outside.
    domains = max(1.0, size / w.links.domain)
    copies = _expect_distinct_places(w.ep, choices) * w.etp * (1 - 1 / size)
    outside = _expect_distinct_places(domains, choices) * (1 - 1 / domains)
    if w.dispatcher == "alltoall":  # a copy per expert, not per rank
        copies, outside = choices * (w.etp - 1 / w.ep), choices * (1 - 1 / domains)
    if w.dispatcher == "allgather":
        copies, outside = float(size - 1), (size - 1) * (1 - 1 / domains)
    inside_s = copies / w.links.inside_bytes_per_s
    # Both kinds of links work at the same time: the slower link counts.
    seconds = max(inside_s, outside / w.links.between_bytes_per_s) if outside else inside_s
    latency = w.links.between_latency_s if outside else w.links.inside_latency_s
    return TrafficMessage("ep", times * token_bytes * copies, inside_share=1 - outside / max(copies, 1e-9),
                          bytes_per_s=copies / seconds, count=times, latency_s=latency * 4)


def build_context_message(w: Workload) -> TrafficMessage:
    """Return the ring messages with keys, values and their gradients (arXiv 2310.01889); under a window only
    the ends of the two pieces per process and row. With `exchanges_heads` (arXiv 2309.14509), and always in
    linear attention: queries, keys, values and outputs."""
    s, cp, (exchanged, messages) = w.shape, w.cp, _count_linear_exchange(w)
    layers = (s.num_attention_layers + s.num_predictions) / w.pp
    if w.exchanges_heads:
        # a process has at least one key head
        heads = 2 * s.num_heads / w.tp + 2 * max(s.num_kv_heads / w.tp, cp)
        times = count_passes(w, "core_attn") * layers * w.num_micro_batches
        volume = times * (cp - 1) / cp * count_local_tokens(w) * heads * s.head_dim * ACTIVATION_BYTES
        return _build_ring_message("cp", w, volume + exchanged, 4 * times * (cp - 1) + messages, cp, w.tp)
    keys = (s.num_heads * (s.query_dim + s.value_dim) if s.kv_lora_rank
            else 2 * s.num_kv_heads * s.head_dim) / w.tp
    # The backward pass sends keys and values again, with their gradients.
    rounds = count_passes(w, "core_attn") + 1
    # A process has two pieces of each row (balanced causal work), so it has two ends.
    windows = ((0, s.num_attention_layers - s.num_window_layers), *s.windowed,
               (s.mtp_window, s.num_predictions))
    tokens = 0.0
    for window, number in windows:
        window_tokens = w.micro_batch_size * 2 * (window - 1) if window else math.inf
        tokens += number * min(count_local_tokens(w), window_tokens)
    volume = rounds * (cp - 1) * (tokens / w.pp) * keys * ACTIVATION_BYTES * w.num_micro_batches
    messages += layers * rounds * (cp - 1) * w.num_micro_batches
    return _build_ring_message("cp", w, volume=volume + exchanged, count=messages, size=cp, stride=w.tp)


def _count_linear_exchange(w: Workload) -> tuple[float, float]:
    """Return bytes and message count for head exchange in linear attention: convolution inputs and gates in
    bf16, outputs in float32."""
    linear, cp = w.shape.linear, w.cp
    if linear is None:
        return 0.0, 0.0
    inputs = linear.num_key_heads * (linear.convolved_channels + 1 + linear.key_head_dim) * ACTIVATION_BYTES
    outputs = linear.num_value_heads * linear.value_head_dim * FLOAT32_BYTES
    times = count_passes(w) * w.shape.num_linear_layers / w.pp * w.num_micro_batches * (cp - 1)
    return times / cp * count_local_tokens(w) / w.tp * (inputs + outputs), 2 * times


def build_pipeline_message(w: Workload) -> TrafficMessage:
    """Return hidden states to the next stage and gradients to the previous stage."""
    if w.pp == 1:
        return TrafficMessage("pp", 0, inside_share=1, bytes_per_s=1, count=0, latency_s=0)
    times = w.num_micro_batches * w.vpp * 2
    volume = times * count_local_tokens(w) / (w.tp if w.sp else 1) * w.shape.hidden_size * ACTIVATION_BYTES
    # Stages are the outermost groups: neighbours share a domain only if all GPUs do.
    inside = w.num_gpus <= w.links.domain
    rate = w.links.inside_bytes_per_s if inside else w.links.between_bytes_per_s
    latency = w.links.inside_latency_s if inside else w.links.between_latency_s
    return TrafficMessage("pp", volume, float(inside), rate, times, latency)


def build_data_messages(w: Workload) -> list[TrafficMessage]:
    """Return the messages with gradients and weights: dense parameters (`dp`), routed experts (`edp`)."""
    if w.objective != "train":
        return []
    # Experts have fewer replicas, so their gradients are reduced in a smaller group.
    dense, experts = count_local_params(w)
    group, cut = w.dp * w.cp, w.sharding_group or w.dp * w.cp
    # ep and etp already split experts, so fewer processes shard them
    per_group: list[tuple[Group, float, int, int, int]] = [
        ("dp", dense, group, w.tp, cut),
        ("edp", experts, w.expert_dp, w.etp * w.ep, cut * w.tp // (w.etp * w.ep))]
    messages = []
    for name, params, size, stride, shared_by in per_group:
        # processes per sharded copy; HSDP has several copies
        shard = max(1, min(size, shared_by))
        # An all-reduce is a reduce-scatter and an all-gather: twice the bytes.
        grads = params * w.grad_bytes * (2 if w.sharding == "none" else 1)
        weights = 0.0 if w.sharding == "none" else params * w.weight_bytes
        times = 1.0
        if gathers_per_micro_batch(w):  # weights in both passes, gradients once
            times = w.num_micro_batches
            weights *= 2
        volume = times * (grads + weights) * (shard - 1) / shard
        # HSDP also sums shards over the copies.
        if shard < size:
            volume += params * w.grad_bytes / shard * 2 * (1 - shard / size)
        count = 0 if size == 1 else times * 3 * w.shape.num_layers / w.pp
        messages.append(_build_ring_message(name, w, volume=volume, count=count, size=size, stride=stride))
    return messages


def count_local_params(w: Workload) -> tuple[float, float]:
    """Return the dense parameters and the routed experts' parameters on a GPU, mean over stages."""
    s = w.shape
    moe = s.num_moe_layers + (s.num_mtp_layers if s.mtp_moe else 0)
    experts = moe * s.num_experts * s.count_block_params("expert")
    rest = s.count_params() + s.count_mtp_params(s.num_experts) - experts
    return rest / (w.tp * w.pp), experts / (w.etp * w.ep * w.pp)


def _expect_distinct_places(places: float, choices: int) -> float:
    """Return the expected distinct places in `choices` uniform draws: n (1 - (1 - 1/n)^k)."""
    return places * (1 - (1 - 1 / places) ** choices) if places > 1 else 1.0


def _build_ring_message(group: Group, w: Workload, volume: float, count: float, size: int, stride: int
                        ) -> TrafficMessage:
    """Return the message in a ring whose members are `stride` ranks apart; members in an NVLink domain share
    its network adapters (NCCL's rings)."""
    if size == 1 or not volume:
        return TrafficMessage(group, 0, inside_share=1, bytes_per_s=1, count=0, latency_s=0)
    members = max(1, w.links.domain // stride)
    if size <= members:
        return TrafficMessage(group, volume, 1, w.links.inside_bytes_per_s, count, w.links.inside_latency_s)
    rate = min(w.links.inside_bytes_per_s, members * w.links.between_bytes_per_s)
    return TrafficMessage(group, volume, 1 - 1 / members, rate, count, w.links.between_latency_s)
