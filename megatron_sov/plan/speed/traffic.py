"""What one GPU multiplies and sends in a step: products of each kind of layer, cut as megatron-core cuts
them, and messages of each group of processes with the links that they take.

A product is [tokens, n] = [tokens, k] x [k, n]; the backward pass has two of the same size, one for the
gradient of the input and one for that of the weight.

Volumes are those of ring algorithms: a process sends (n - 1) / n of the whole in an all-gather or a
reduce-scatter over n.  Tensor and sequence parallelism: arXiv 2205.05198, section 4.2.2; sharding: ZeRO,
arXiv 1910.02054, section 7; experts: a copy of a token for each rank, or each NVLink domain, that it visits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_sov.model.families.count import compute_mean_keys
from megatron_sov.plan.footprint.activations import DELTA_RULE_CHUNK
from megatron_sov.plan.footprint.stage_parameters import FLOAT32_BYTES
from megatron_sov.plan.speed.workload import Block, Workload

ATTENTION_BACKWARD = 2.5
"""FLOPs of flash attention's backward pass in units of its forward pass: five products for two
(arXiv 2205.14135, appendix B)."""


@dataclass(frozen=True)
class Product:
    """A matrix product on one GPU, or one for each of several groups of rows (experts)."""

    tokens: float
    n: float
    k: float
    """Rows of the weight, over which the sum runs."""
    groups: float = 1
    """Weights: experts that the GPU holds."""
    quantized: bool = True
    """Whether the workload's precision holds; routers and heads stay in bf16."""
    part: str = ""
    """What recomputation calls it: mla_up_proj, mlp, moe, shared_experts; `HEAD`; or nothing."""

    @property
    def flops(self) -> float:
        return 2 * self.tokens * self.n * self.k


def count_local_tokens(w: Workload) -> float:
    """Return the tokens of a micro-batch that meet the products of one GPU."""
    return w.micro_batch_size * w.seq_len / w.cp


def list_products(w: Workload, block: Block) -> list[Product]:
    """Return the products of a block of a layer on one GPU; of routed experts the grouped ones of the fullest
    GPU."""
    # Experts have a grid of their own: cut by etp, spread over ep, and fed with the tokens of the fullest
    # GPU.
    tokens, cut, groups = count_local_tokens(w), w.tp, 1.0
    if block == "expert":
        tokens, cut, groups = count_expert_rows(w), w.etp, w.shape.num_experts / w.ep
    return [Product(tokens / w.tp if one.cut == "tokens" else tokens,
                    one.rows / cut if one.cut == "rows" else one.rows,
                    one.columns / cut if one.cut == "columns" else one.columns,
                    groups, one.quantized, one.part) for one in w.shape.list_matrices(block)]


def count_expert_rows(w: Workload) -> float:
    return count_local_tokens(w) / w.tp * w.etp * w.shape.num_experts_per_token * w.imbalance


def count_attention_flops(w: Workload, window: int) -> float:
    """Return the FLOPs of queries with keys and of weights with values of one layer, forward, causal half.

    Args:
        w: the workload; where attention stays inside documents, keys are those of a document.
        window: keys that a query sees at most; 0: all.
    """
    s = w.shape
    # Packed rows attend inside their documents, so a document's length counts, not the row's.
    keys = compute_mean_keys(min(w.document_tokens or w.seq_len, w.seq_len), window)
    return 2 * count_local_tokens(w) * keys * s.num_heads / w.tp * (s.query_dim + s.value_dim)


# Bytes that kernels without matrix products pass through a GPU's memory in a micro-batch's forward pass.

NUMBER_BYTES = 2
NORM, RESIDUAL = 2, 3
"""A norm reads and writes, a residual sum reads two and writes one."""
LOGIT_BYTES = 14
"""Of each logit, both passes: written in bf16, read for the largest, read and written for the sum's
exponentials, read and written for the gradient in 4 or 2 bytes."""
SCORE_BYTES = 24
"""Of each router score: logits, scores, chosen ones and map, in 4 bytes."""
PERMUTED = {"alltoall": 8, "allgather": 6, "deepep": 4, "hybridep": 4}
"""Dispatcher -> how often a routed token's numbers are read or written around its expert's products."""
MAMBA_PASSES = 20
"""Of the inner width: convolution (in, out), scan (in, out, states of chunks in 4 bytes), gate and norm."""
SCAN_CHUNK = 128
"""Tokens of a chunk of the scan (arXiv 2405.21060, section 6)."""


def _count_residual_bytes(w: Workload) -> float:
    # Sequence parallelism cuts norms and residuals by tokens; without it every rank does all of them.
    tokens = count_local_tokens(w) / (w.tp if w.sp else 1)
    return (NORM * w.shape.norms_per_block + RESIDUAL) * tokens * w.shape.hidden_size * NUMBER_BYTES


def count_attention_bytes(w: Workload) -> float:
    """Return the bytes of an attention block: norm, rotation of queries and keys, residual."""
    s = w.shape
    kv_heads = s.num_heads if s.kv_lora_rank else s.num_kv_heads
    rotated = (s.num_heads + kv_heads) * s.query_dim / w.tp
    # under latent attention the parts of queries and keys are put together in one more copy
    copies = 4 if s.kv_lora_rank else 2
    return _count_residual_bytes(w) + copies * count_local_tokens(w) * rotated * NUMBER_BYTES


def count_mamba_bytes(w: Workload) -> float:
    inner = w.shape.mamba_num_heads * w.shape.mamba_head_dim / w.tp
    return _count_residual_bytes(w) + MAMBA_PASSES * count_local_tokens(w) * inner * NUMBER_BYTES


def count_mamba_scan_flops(w: Workload) -> float:
    """Return the FLOPs of a Mamba-2 block's chunked scan, forward (arXiv 2405.21060, section 6)."""
    s = w.shape
    inner = s.mamba_num_heads * s.mamba_head_dim
    per_token = 2 * SCAN_CHUNK * (s.mamba_num_groups * s.mamba_state_dim + inner)
    return count_local_tokens(w) / w.tp * (per_token + 4 * inner * s.mamba_state_dim)


def count_linear_bytes(w: Workload) -> float:
    """Return the bytes of a block of linear attention: norm, convolution, scan, gate, residual."""
    assert w.shape.linear is not None
    values = w.shape.linear.num_value_heads * w.shape.linear.value_head_dim / w.tp
    return _count_residual_bytes(w) + MAMBA_PASSES * count_local_tokens(w) * values * NUMBER_BYTES


def count_linear_scan_flops(w: Workload) -> float:
    """Return the FLOPs of the delta rule in chunks, forward: of a chunk's tokens with one another, with the
    state, and the triangular system (arXiv 2406.06484, section 3.2).  Not measured."""
    linear = w.shape.linear
    assert linear is not None
    keys, values = linear.key_head_dim, linear.value_head_dim
    within = 2 * DELTA_RULE_CHUNK * (2 * keys + values + (keys + values) / 2)
    return count_local_tokens(w) / w.tp * linear.num_value_heads * (within + 6 * keys * values)


def count_dense_bytes(w: Workload) -> float:
    """Return the bytes of a dense feed-forward network: norm, activation, residual."""
    return _count_residual_bytes(w) + _count_activation_bytes(w,
                                 count_local_tokens(w), w.shape.dense_ffn_dim / w.tp)


def count_activation_bytes(w: Workload) -> float:
    s = w.shape
    return _count_activation_bytes(w, count_expert_rows(w), s.expert_ffn_dim / w.etp)


def count_moe_bytes(w: Workload) -> float:
    """Return the bytes of a layer with experts, their activation left out: norm, router, sorting tokens by
    expert and back, shared experts' activation, residual."""
    s, own = w.shape, count_local_tokens(w) / w.tp
    sorted_bytes = (PERMUTED[w.dispatcher] * own * w.etp * s.num_experts_per_token * w.imbalance
                    * s.expert_width * NUMBER_BYTES)
    shared = _count_activation_bytes(w, count_local_tokens(w), s.num_shared_experts * s.expert_ffn_dim / w.tp)
    return _count_residual_bytes(w) + count_score_bytes(w) + sorted_bytes + shared


def count_score_bytes(w: Workload) -> float:
    """Return the bytes of a router's scores of all experts."""
    return count_local_tokens(w) / w.tp * w.shape.num_experts * SCORE_BYTES


def count_head_bytes(w: Workload) -> float:
    """Return the bytes of the logits, both passes together."""
    return count_local_tokens(w) * w.shape.vocab_size / w.tp * LOGIT_BYTES


def count_quantized_bytes(products: Iterable[Product], frozen: bool) -> float:
    """Return the bytes of quantising the operands of products in 8 or 4 bits, both passes: inputs and
    gradients of outputs are read in bf16 and written along their rows and their columns; along rows alone
    where the weights are frozen."""
    each = 3 if frozen else 4
    return sum(each * (p.tokens * p.k + p.tokens * p.n) for p in products if p.quantized)


def count_adapter_bytes(products: Iterable[Product]) -> float:
    """Return the bytes of adapters beside frozen products, forward: their input is read once more, what they
    add is written into the product's output."""
    return sum((p.tokens * p.k + 2 * p.tokens * p.n) * NUMBER_BYTES for p in products)


def _count_activation_bytes(w: Workload, rows: float, width: float) -> float:
    """Return the bytes of a gate or another activation: all inputs read, one product written."""
    return w.shape.ffn_matrices * rows * width * NUMBER_BYTES


Group = Literal["tp", "ep", "cp", "pp", "dp", "edp"]
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class TrafficMessage:
    group: Group
    """Tensor, expert, context, pipeline or data parallelism (edp: of routed experts)."""
    num_bytes: float
    """Bytes that it sends in a step."""
    inside_share: float
    """Share of them that stays inside an NVLink domain."""
    bytes_per_s: float
    """Rate of the links that bound it, without any loss."""
    count: float
    """Messages, each of which costs a latency."""
    latency_s: float

    @property
    def link(self) -> Literal["inside", "between"]:
        return "inside" if self.inside_share >= 1 else "between"


def list_messages(w: Workload) -> tuple[TrafficMessage, ...]:
    """Return what one GPU of a middle stage sends in a step; nothing where a group has one process."""
    found = [build_tensor_message(w), build_expert_message(w), build_context_message(
        w), build_pipeline_message(w), *build_data_messages(w)]
    return tuple(m for m in found if m.num_bytes)


def count_layers_per_gpu(w: Workload) -> float:
    return w.shape.num_layers / w.pp


def gathers_each_micro_batch(w: Workload) -> bool:
    """Return whether sharded weights are gathered anew for each micro-batch; a pipeline keeps them."""
    return w.sharding == "fsdp" and w.pp == 1


def count_passes(w: Workload, module: str = "") -> float:
    """Return how many forward passes' worth of messages a micro-batch has: forward, backward, and what is
    recomputed."""
    again = w.recompute == "full" or (w.recompute == "selective" and module in w.recompute_modules)
    return 3 if again else 2


def build_tensor_message(w: Workload) -> TrafficMessage:
    """Return all-gathers and reduce-scatters around attention and dense feed-forward networks."""
    s, tp = w.shape, w.tp
    blocks = s.num_attention_layers + s.num_linear_layers + s.num_mamba_layers
    blocks += s.num_feed_forward_layers - s.num_moe_layers + (s.num_moe_layers if s.num_shared_experts else 0)
    blocks += 2 * s.num_predictions
    # forward: gather and scatter; backward: the same, and under sp the input is gathered once more for the
    # gradient of the weight
    pairs = 2 * count_passes(w) + (1 if w.sp and w.objective == "train" else 0)
    # what a quantised product takes may be gathered as it is multiplied, in 8 bits
    item = ACTIVATION_BYTES if w.precision == "bf16" or not w.overlap_tp else 1.5
    activations = count_local_tokens(w) * s.hidden_size * item
    volume = blocks / w.pp * pairs * activations * (tp - 1) / tp * w.num_micro_batches
    count = 0 if tp == 1 else blocks / w.pp * pairs * w.num_micro_batches
    return _build_ring_message("tp", w, volume, count, tp, 1)


def build_expert_message(w: Workload) -> TrafficMessage:
    """Return dispatch and combination of tokens, forward and backward.  Processes that share a cut expert
    each have all of its tokens: all-to-all is followed by a gathering among them (`token_dispatcher` of
    megatron-core, 0.19.2), the other dispatchers send every one its own copy."""
    s, size, choices = w.shape, w.ep * w.etp, w.shape.num_experts_per_token
    moe = s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    if not moe or size == 1:
        return TrafficMessage("ep", 0, 1, 1, 0, 0)
    times = moe / w.pp * 2 * count_passes(w, "moe") * w.num_micro_batches
    token_bytes = count_local_tokens(w) / w.tp * s.expert_width * ACTIVATION_BYTES * w.imbalance
    # Fractions are meant: a group a bit larger than a domain has few partners outside.
    domains = max(1.0, size / w.links.domain)
    copies = _expect_distinct_places(w.ep, choices) * w.etp * (1 - 1 / size)
    outside = _expect_distinct_places(domains, choices) * (1 - 1 / domains)
    if w.dispatcher == "alltoall":  # a copy for each expert, not for each rank
        copies, outside = choices * (w.etp - 1 / w.ep), choices * (1 - 1 / domains)
    if w.dispatcher == "allgather":
        copies, outside = float(size - 1), (size - 1) * (1 - 1 / domains)
    inside_s = copies / w.links.inside_bytes_per_s
    # Both kinds of links work at the same time: the slower one counts.
    seconds = max(inside_s, outside / w.links.between_bytes_per_s) if outside else inside_s
    latency = w.links.between_latency_s if outside else w.links.inside_latency_s
    return TrafficMessage("ep", times * token_bytes * copies, 1 - outside / max(copies, 1e-9),
                          copies / seconds, times, latency * 4)


def build_context_message(w: Workload) -> TrafficMessage:
    """Return keys and values that go round the ring, and their gradients (arXiv 2310.01889); of layers with
    a window the ends of the two pieces that a process has of each row, which the next ones see.  Where heads
    are exchanged (arXiv 2309.14509): queries, keys, values and what is attended, in every layer; of linear
    attention always."""
    s, cp, (exchanged, messages) = w.shape, w.cp, _count_linear_exchange(w)
    layers = (s.num_attention_layers + s.num_predictions) / w.pp
    if w.exchanges_heads:
        # of keys each process has one head at least
        heads = 2 * s.num_heads / w.tp + 2 * max(s.num_kv_heads / w.tp, cp)
        times = count_passes(w, "core_attn") * layers * w.num_micro_batches
        volume = times * (cp - 1) / cp * count_local_tokens(w) * heads * s.head_dim * ACTIVATION_BYTES
        return _build_ring_message("cp", w, volume + exchanged, 4 * times * (cp - 1) + messages, cp, w.tp)
    keys = (s.num_heads * (s.query_dim + s.value_dim) if s.kv_lora_rank
            else 2 * s.num_kv_heads * s.head_dim) / w.tp
    # The backward pass sends keys and values round once more, and their gradients with them.
    rounds = count_passes(w, "core_attn") + 1
    # A process has two pieces of each row (balanced causal work), so it has two ends.
    windows = ((0, s.num_attention_layers - s.num_window_layers), *s.windowed,
               (s.mtp_window, s.num_predictions))
    tokens = sum(number * (min(count_local_tokens(w), w.micro_batch_size * 2 * (window - 1)) if window
                           else count_local_tokens(w)) for window, number in windows) / w.pp
    volume = rounds * (cp - 1) * tokens * keys * ACTIVATION_BYTES * w.num_micro_batches
    messages += layers * rounds * (cp - 1) * w.num_micro_batches
    return _build_ring_message("cp", w, volume + exchanged, messages, cp, w.tp)


def _count_linear_exchange(w: Workload) -> tuple[float, float]:
    """Return the bytes and the messages by which linear attention gets whole rows of its heads: what is
    convolved and gates of the state, and in the precision of the state what is found."""
    linear, cp = w.shape.linear, w.cp
    if linear is None:
        return 0.0, 0.0
    inputs = linear.num_key_heads * (linear.convolved_channels + 1 + linear.key_head_dim) * ACTIVATION_BYTES
    outputs = linear.num_value_heads * linear.value_head_dim * FLOAT32_BYTES
    times = count_passes(w) * w.shape.num_linear_layers / w.pp * w.num_micro_batches * (cp - 1)
    return times / cp * count_local_tokens(w) / w.tp * (inputs + outputs), 2 * times


def build_pipeline_message(w: Workload) -> TrafficMessage:
    """Return hidden states to the next stage and gradients to the one before."""
    if w.pp == 1:
        return TrafficMessage("pp", 0, 1, 1, 0, 0)
    times = w.num_micro_batches * w.vpp * 2
    volume = times * count_local_tokens(w) / (w.tp if w.sp else 1) * w.shape.hidden_size * ACTIVATION_BYTES
    # Stages are the outermost groups of ranks: neighbours are in one domain only if the whole run is.
    inside = w.num_gpus <= w.links.domain
    rate = w.links.inside_bytes_per_s if inside else w.links.between_bytes_per_s
    latency = w.links.inside_latency_s if inside else w.links.between_latency_s
    return TrafficMessage("pp", volume, float(inside), rate, times, latency)


def build_data_messages(w: Workload) -> list[TrafficMessage]:
    """Return gradients and weights over data-parallel processes: those of all, and of routed experts."""
    if w.objective != "train":
        return []
    # Experts have fewer copies than the rest, so their gradients go round another, smaller group.
    dense, experts = count_local_params(w)
    group, cut = w.dp * w.cp, w.sharding_group or w.dp * w.cp
    # experts, which ep and etp have cut before, are shared by as many processes less
    per_group: list[tuple[Group, float, int, int, int]] = [
        ("dp", dense, group, w.tp, cut),
        ("edp", experts, w.expert_dp, w.etp * w.ep, cut * w.tp // (w.etp * w.ep))]
    found = []
    for name, params, size, stride, shared_by in per_group:
        # Processes that share one copy; under HSDP there are several copies, see below.
        shard = max(1, min(size, shared_by))
        # An all-reduce is a reduce-scatter and an all-gather: twice the bytes of one of them.
        grads = params * w.grad_bytes * (2 if w.sharding == "none" else 1)
        weights = 0.0 if w.sharding == "none" else params * w.weight_bytes
        times = 1.0
        if gathers_each_micro_batch(w):  # weights in both passes, what is recomputed has them; gradients once
            times = w.num_micro_batches
            weights *= 2
        volume = times * (grads + weights) * (shard - 1) / shard
        # HSDP: the shards of different copies are summed up, too.
        if shard < size:
            volume += params * w.grad_bytes / shard * 2 * (1 - shard / size)
        found.append(_build_ring_message(name, w, volume, 0 if size ==
                     1 else times * 3 * count_layers_per_gpu(w), size, stride))
    return found


def count_local_params(w: Workload) -> tuple[float, float]:
    """Return the weights of a GPU's share of the model, the mean over stages: all but routed experts, and
    those."""
    s = w.shape
    moe = s.num_moe_layers + (s.num_mtp_layers if s.mtp_moe else 0)
    experts = moe * s.num_experts * s.count_block_params("expert")
    rest = s.params() + s.count_mtp_params(s.num_experts) - experts
    return rest / (w.tp * w.pp), experts / (w.etp * w.ep * w.pp)


def _expect_distinct_places(places: float, choices: int) -> float:
    """Return how many of so many places a token's choices fall on, all being as likely."""
    # Expected number of distinct places in `choices` draws: each place is missed with (1 - 1/n)^k.
    return places * (1 - (1 - 1 / places) ** choices) if places > 1 else 1.0


def _build_ring_message(
    group: Group,
    w: Workload,
    volume: float,
    count: float,
    size: int,
     stride: int) -> TrafficMessage:
    """Return a message of a ring whose members stand `stride` ranks apart: all members of a domain put their
    adapters together where it leaves the domain (NCCL's rings)."""
    if size == 1 or not volume:
        return TrafficMessage(group, 0, 1, 1, 0, 0)
    # Ranks of a group are `stride` apart, so that many of them share a domain.
    members = max(1, w.links.domain // stride)
    if size <= members:
        return TrafficMessage(group, volume, 1, w.links.inside_bytes_per_s, count, w.links.inside_latency_s)
    rate = min(w.links.inside_bytes_per_s, members * w.links.between_bytes_per_s)
    return TrafficMessage(group, volume, 1 - 1 / members, rate, count, w.links.between_latency_s)
