"""Estimate the activation bytes that layers save, before and after recomputation and offloading.

In bf16 by Transformer Engine's modules (2.20.2): a norm inside a linear layer saves input and output, linear
layers and SwiGLU save inputs, fused attention saves queries, keys, values and output. Otherwise by modules of
megatron-core (0.19.2) and ours, which are unfused, so norms and SwiGLU save more; measured in
`benchmarks/plan_activations.py`. Rotary angles, shared by all layers, are not included.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_sov.model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, RunConfig
from megatron_sov.model.config.lora import HEAD
from megatron_sov.plan.footprint.stage_parameters import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, list_chunk_layers)

INDEX_BYTES = 8
DELTA_RULE_CHUNK = 64
"""Tokens per chunk in linear attention (`engine.model.delta_rule`)."""
QUERY_BLOCK = 1024
"""Queries per mask in sliding-window attention without a fused kernel (`engine.model.attention`)."""
GRAPH_BYTES = 1 << 20
"""Device memory per CUDA graph, some 50 kernels. Assumed: vLLM's graphs take about 25 KB per kernel."""
FLOATS_PER_SCORE = 5
"""Saved float32 numbers per router score: logits, scores, shares, weights and balancing loss. Measured."""


@dataclass(frozen=True)
class SavedActivations:
    residuals: int = 0
    """Residual norm inputs; unfused norms also save normalized inputs."""
    qkv_input: int = 0
    """Input to the projection to queries, keys and values (`linear_qkv`)."""
    qkv: int = 0
    """Projected queries, keys and values."""
    rotated: int = 0
    """Queries and keys after rotation."""
    core: int = 0
    """Attention output and softmax sums; without a fused kernel also window masks."""
    attended: int = 0
    """Input to the output projection (`linear_proj`), if it differs from the attention output."""
    gathered: int = 0
    """Gathered keys and values under context parallelism."""
    ffn_input: int = 0
    """Input to the feed-forward network."""
    router: int = 0
    """Router scores, choices and token order."""
    expert_input: int = 0
    """Routed tokens in expert order."""
    expert_hidden: int = 0
    """Gate and up projection in routed experts."""
    expert_activated: int = 0
    """Input to the experts' down projection; unfused, also its factors."""
    shared: int = 0
    """Activations inside shared experts."""
    dense: int = 0
    """Activations inside a dense feed-forward network."""

    @property
    def routed(self) -> int:
        return self.expert_input + self.expert_hidden + self.expert_activated

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class LayerKind(NamedTuple):
    with_experts: bool
    window: int
    """Attention window in tokens; 0: none."""
    rotates: bool
    bounded: bool = False
    """Whether SwiGLU inputs are clamped, which saves the unclamped inputs, too."""
    is_linear: bool = False
    """Linear attention."""


@lru_cache(maxsize=64)
def list_layer_kinds(m: ModelConfig) -> tuple[LayerKind, ...]:
    first_moe = m.num_layers - m.num_moe_layers()
    return tuple(_build_kind(m, layer >= first_moe, kind, window, limit > 0) for layer, (kind,
                 window, limit) in enumerate(zip(m.layer_types(), m.windows(), m.limits(), strict=True)))


def _build_kind(m: ModelConfig, with_experts: bool, attention: str, window: int, bounded: bool) -> LayerKind:
    return LayerKind(with_experts, window, attention == "sliding_attention" or m.rope_on_global, bounded,
                     attention == "linear_attention")


class Tokens(NamedTuple):
    """Token counts in a micro-batch on a process."""

    row: int
    """Tokens over all context-parallel processes."""
    local: int
    share: int
    """Local tokens divided by tp under sequence parallelism."""


def count_tokens(config: RunConfig, row_tokens: int) -> Tokens:
    """Count a process's tokens in a micro-batch with `row_tokens` tokens."""
    p = config.parallel
    local = row_tokens // p.cp
    return Tokens(row_tokens, local, local // (p.tp if p.sp else 1))


def estimate_saved(config: RunConfig, row_tokens: int, kind: LayerKind) -> SavedActivations:
    """Return the bytes that a layer saves without recomputation and with balanced routing."""
    p = config.parallel
    # `auto` may lack kernels, and plain torch saves more.
    by_kernels = config.gpu.linear_attention == "fla" and config.train.precision == "bf16"
    return _estimate_saved(config.model, config.train.precision, tokens=count_tokens(config, row_tokens),
                           tp=p.tp, etp=p.etp, cp=p.cp, kind=kind, by_kernels=by_kernels)


@lru_cache(maxsize=1 << 14)
def _estimate_saved(m: ModelConfig, precision: str, tokens: Tokens, tp: int, etp: int, cp: int,
                    kind: LayerKind, by_kernels: bool) -> SavedActivations:
    """Compute `estimate_saved` from hashable arguments, cached."""
    item, fused = ITEM_BYTES[precision], precision == "bf16"
    hidden = tokens.share * m.hidden_size * item
    # torch's norm saves its input, the normalized input and 1 / norm
    norm = hidden if fused else 2 * hidden + tokens.share * item
    attention = _estimate_attention(m, precision, tokens, tp, cp, kind, by_kernels)
    # clamped SwiGLU saves gate and up projection twice
    twice = 2 if kind.bounded else 1
    if not kind.with_experts:
        dense = m.dense_ffn_dim // tp
        inside = tokens.local * dense * item * ((1 if fused else 2) + 2 * twice)
        return SavedActivations(residuals=m.norms_per_layer() * norm, qkv_input=hidden,
                                ffn_input=hidden, **attention, dense=inside)
    shared = m.num_shared_experts * m.expert_ffn_dim // tp
    routed, inner = tokens.share * m.num_experts_per_token, m.expert_ffn_dim // etp
    # processes with parts of an expert have all its tokens
    arrived = routed * etp
    return SavedActivations(
        residuals=m.norms_per_layer() * norm, qkv_input=hidden, ffn_input=hidden, **attention,
        router=(tokens.share * m.num_experts * (FLOATS_PER_SCORE * FLOAT32_BYTES + 1)
                + routed * (3 * INDEX_BYTES + 2 * FLOAT32_BYTES)),
        expert_input=arrived * m.hidden_size * item, expert_hidden=arrived * 2 * inner * item * twice,
        expert_activated=arrived * inner * item * (1 if fused else 3),
        shared=tokens.local * shared * item * ((1 if fused else 2) + 2 * twice))


def _estimate_attention(m: ModelConfig, precision: str, tokens: Tokens, tp: int, cp: int,
                        kind: LayerKind, by_kernels: bool) -> dict[str, int]:
    """Return field in `SavedActivations` -> bytes that attention saves."""
    if kind.is_linear:
        assert m.linear_attention is not None
        if by_kernels:
            return _estimate_fla_attention(m.linear_attention, tokens, tp)
        return _estimate_linear_attention(m.linear_attention, precision, tokens, tp)
    if m.latent_attention is not None:
        return _estimate_latent_attention(m, m.latent_attention, precision, tokens, tp, cp)
    item, fused = ITEM_BYTES[precision], precision == "bf16"
    queries, keys = m.num_heads * m.head_dim // tp, m.num_kv_heads * m.head_dim // tp
    sums = tokens.local * (m.num_heads // tp) * max(item, FLOAT32_BYTES)
    per_token = tokens.local * item
    # A window as long as the row needs no masks.
    slides = 0 < kind.window < tokens.row
    # query norms copy queries that are not contiguous
    copied = queries if m.qk_norm and m.num_kv_heads > tp else 0
    # projected gate, its sigmoid, and the gated output
    gate = tokens.local * queries * (2 * item + max(item, FLOAT32_BYTES)) if m.attention_output_gate else 0
    gathered = {"gathered": 0}
    if cp > 1:
        # A process has two pieces of a row, each with keys from one window back.
        reached = min(tokens.row, tokens.local + 2 * kind.window) if slides else tokens.row
        gathered["gathered"] = 2 * reached * keys * item
    if fused:
        return gathered | {"qkv": per_token * (queries + 2 * keys + copied) + gate,
                           "rotated": per_token * (queries + keys), "core": per_token * queries + sums}
    projected = per_token * (queries + 2 * keys)  # includes values
    qkv = projected + gate + per_token * (copied + (queries + keys if m.qk_norm else 0))
    if cp > 1 and not slides:  # attention to gathered keys is recomputed in the backward pass
        return gathered | {"qkv": qkv, "rotated": per_token * queries, "attended": per_token * queries}
    masks = _count_mask_elements(tokens.local, kind.window) * item if slides and cp == 1 else 0
    attended = per_token * queries if slides else 0
    return gathered | {"qkv": qkv, "rotated": per_token * (queries + keys),
                       "core": per_token * queries + sums + masks, "attended": attended}


def _estimate_latent_attention(m: ModelConfig, latent: LatentAttentionConfig,
                               precision: str, tokens: Tokens, tp: int, cp: int) -> dict[str, int]:
    """Return the bytes that latent attention saves: both low-rank vectors before and after their norms, then
    all heads' queries, keys and values. Not measured."""
    item, heads = ITEM_BYTES[precision], m.num_heads // tp
    per_token, narrow = tokens.local * item, latent.kv_lora_rank + (latent.q_lora_rank or 0)
    # unfused kernels pad values to the width of queries
    values = heads * (latent.v_head_dim if precision == "bf16" and cp == 1 else latent.query_dim)
    return {"gathered": 2 * tokens.row * heads * latent.query_dim * item if cp > 1 else 0,
            "qkv": tokens.share * item * (2 * narrow + latent.qk_rope_head_dim),
            "rotated": per_token * (2 * heads * latent.query_dim + values),
            "core": per_token * values + tokens.local * heads * max(item, FLOAT32_BYTES),
            "attended": per_token * heads * latent.v_head_dim}


def _estimate_linear_attention(linear: LinearAttentionConfig, precision: str, tokens: Tokens, tp: int
                      ) -> dict[str, int]:
    """Return the bytes that linear attention saves in plain torch: projections; in the state's precision,
    inputs per convolution tap, and outputs before and after the activation; per chunk and head three square
    matrices, both sides in the triangular system, and states; output, norm and gate."""
    item, wide = ITEM_BYTES[precision], max(ITEM_BYTES[precision], FLOAT32_BYTES)
    channels = linear.num_key_heads * linear.convolved_channels // tp
    heads, keys, values = linear.num_key_heads // tp, linear.key_head_dim, linear.value_head_dim
    projected = (tokens.local * heads * (sum(linear.projected) + keys + values)
                 + tokens.share * 2 * linear.gate_rank)
    inside = (heads * (3 * DELTA_RULE_CHUNK + 23 * keys + 3 * values + 4)
              + linear.state_size // tp // DELTA_RULE_CHUNK)
    return {"gathered": 0, "qkv": projected * item,
            "rotated": tokens.local * wide * channels * (linear.conv_taps + 2),
            "core": tokens.local * wide * inside,
            "attended": tokens.local * heads * values * ((4 if item == wide else 5) * wide + item)}


def _estimate_fla_attention(linear: LinearAttentionConfig, tokens: Tokens, tp: int) -> dict[str, int]:
    """Return the bytes that linear attention saves in bf16 with flash-linear-attention (fla-core 0.6.0,
    `save_for_backward` in `chunk.py`): queries, keys and values in bf16, learning rates, decays and their
    sums in float32, and two square matrices per head and chunk. Around the kernel it saves the same as plain
    torch."""
    item, wide = BF16_BYTES, FLOAT32_BYTES
    channels = linear.num_key_heads * linear.convolved_channels // tp
    heads, keys, values = linear.num_key_heads // tp, linear.key_head_dim, linear.value_head_dim
    # also query and key norms, and inputs to rates and decays
    inside = heads * ((2 * keys + values + 2 * DELTA_RULE_CHUNK) * item + (4 * keys + 5) * wide)
    return {"gathered": 0, "qkv": tokens.share * 2 * linear.gate_rank * item,
            "rotated": tokens.local * wide * channels * (linear.conv_taps + 2),
            "core": tokens.local * inside,
            "attended": tokens.local * heads * values * (4 * wide + item)}


def _count_mask_elements(tokens: int, window: int) -> int:
    """Count a document's mask elements under a sliding window, in blocks with `QUERY_BLOCK` queries."""
    return sum(min(QUERY_BLOCK, tokens - start) * (min(tokens, start + QUERY_BLOCK)
                                                   - max(0, start - window + 1))
               for start in range(0, tokens, QUERY_BLOCK))


def count_stored_bytes(config: RunConfig, row_tokens: int, kind: LayerKind, saved: SavedActivations) -> int:
    """Return a layer's bytes that stay on the device until its backward pass, under `train.recompute` and
    `gpu.offload_modules`. `row_tokens`: tokens in a micro-batch, over all context-parallel processes;
    `saved`: result from `estimate_saved`."""
    # Full recomputation only saves the layer's input.
    if config.train.recompute is True:
        hidden = count_tokens(config, row_tokens).share * config.model.hidden_size
        return hidden * ITEM_BYTES[config.train.precision]
    stored = (saved.total - _count_recomputed_bytes(config, saved, kind)
              - _count_offloaded_bytes(config, saved, kind))
    if kind.with_experts and _permutes_in_graph(config):
        stored += saved.expert_input // config.parallel.etp
    overlaps = config.parallel.expert_overlap == "micro_batches" and config.model.num_shared_experts
    if kind.with_experts and overlaps:  # `ScheduleNode` holds the shared experts' output
        stored += saved.ffn_input
    return stored


def _permutes_in_graph(config: RunConfig) -> bool:
    """Return whether router graphs permute tokens, which they return in their own memory."""
    return "moe_preprocess" in config.gpu.cuda_graphs and config.parallel.expert_dispatcher == "alltoall"


def _count_recomputed_bytes(config: RunConfig, saved: SavedActivations, kind: LayerKind) -> int:
    """Return a layer's bytes that `gpu.recompute_modules` recomputes."""
    modules, num_bytes = config.gpu.recompute_modules, 0
    fused = config.train.precision == "bf16"
    # recomputing fused attention saves nothing, and linear attention is not recomputed
    if "core_attn" in modules and not fused and not kind.is_linear:
        num_bytes += saved.core
    if "mlp" in modules:
        num_bytes += saved.dense
    # `moe` includes `moe_act` and `shared_experts`: count their bytes once.
    if "moe" in modules:
        return num_bytes + saved.router + saved.routed + saved.shared
    # a graph returns the norm's output, unless it permutes tokens
    keeps_norm = config.gpu.cuda_graphs and not _permutes_in_graph(config)
    if "layernorm" in modules and kind.with_experts and not keeps_norm and config.model.block_norms != "post":
        num_bytes += saved.ffn_input  # linear layers contain all further norms
    if "moe_act" in modules:
        num_bytes += saved.expert_activated
    return num_bytes + (saved.shared if "shared_experts" in modules else 0)


def _count_offloaded_bytes(config: RunConfig, saved: SavedActivations, kind: LayerKind) -> int:
    """Return a layer's bytes in host memory (`gpu.offload_modules`)."""
    recomputed, m = config.gpu.recompute_modules, config.model
    before_ffn = 0 if m.block_norms == "post" else saved.residuals // m.norms_per_layer()
    parts = {"qkv_linear": saved.qkv_input, "core_attn": saved.qkv, "attn_proj": saved.core,
             "mlp_norm": before_ffn, "expert_fc1": saved.expert_input,
             "moe_act": saved.expert_hidden // (2 if kind.bounded else 1)}
    if kind.is_linear:  # only the library's attention modules offload inputs
        parts |= dict.fromkeys(("qkv_linear", "core_attn", "attn_proj"), 0)
    return sum(parts[module] for module in config.gpu.offload_modules
               if not ("moe" in recomputed and module in ("expert_fc1", "moe_act")))


def count_pending_micro_batches(pp: int, vpp: int, stage: int, num_micro_batches: int) -> list[int]:
    """Return the maximum number of micro-batches that wait for the backward pass, per chunk on a stage.

    1F1B (arXiv 2104.04473, section 2.2), interleaved (section 2.3): the warm-up follows the library
    (`schedules.get_pp_rank_microbatches`, 0.19.2), in groups of `pp` micro-batches per chunk.

    Args:
        pp: pipeline stages.
        vpp: chunks per stage.
        stage: pipeline stage (0-based).
        num_micro_batches: micro-batches per step and replica.
    """
    if vpp == 1:
        return [min(pp - stage, num_micro_batches)]
    # Forward passes before the stage's first backward pass, over all chunks.
    ahead = min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, num_micro_batches * vpp)
    # A round gives each chunk `pp` micro-batches in turn; the rest fills chunks in order.
    rounds, rest = divmod(ahead, pp * vpp)
    return [rounds * pp + min(pp, max(0, rest - chunk * pp)) for chunk in range(vpp)]


@dataclass(frozen=True)
class StoredActivations:
    waiting: int
    """Saved by layers, embedding and prediction layers for all pending micro-batches."""
    head: int
    """Gradients that the loss computes in the forward pass: hidden states and the head's weight."""
    recomputed: int
    """Recomputed activations in the largest layer; 0 without `train.recompute`."""
    norms: int
    """Part in `waiting` that the newest micro-batch saves after the trunk, freed before recomputation."""
    largest: int
    """Activations in the largest layer without recomputation."""
    unevenly: int
    """Routed experts' bytes in `waiting`, which grow with imbalance."""
    layer_unevenly: int
    """Routed experts' bytes in the largest layer."""

    @property
    def saved(self) -> int:
        # The head's gradients and a recomputed layer never coexist, so the larger counts.
        return self.waiting + max(self.head, self.recomputed - self.norms)


def estimate_stored(config: RunConfig, stage: int, seq_len: int, num_micro_batches: int) -> StoredActivations:
    """Return the activation bytes on a process on pipeline stage `stage` (0-based)."""
    m, p = config.model, config.parallel
    row = seq_len * config.train.micro_batch_size
    layer_kinds = list_layer_kinds(m)
    counts = count_pending_micro_batches(p.pp, p.vpp, stage, num_micro_batches)
    last = stage == p.pp - 1
    kind_counts: dict[LayerKind, int] = {}
    chunks = list_chunk_layers(p, stage, m.num_layers)
    for layers, count in zip(chunks, counts, strict=True):
        for layer in layers:
            # Layers with equal kinds save equal bytes.
            kind_counts[layer_kinds[layer]] = kind_counts.get(layer_kinds[layer], 0) + count
    if p.expert_overlap == "micro_batches" and sum(counts) < num_micro_batches * p.vpp:
        # The backward pass of another micro-batch frees a layer for each layer that the forward pass saves.
        kind_counts[layer_kinds[chunks[-1][-1]]] += 1
    if last and m.num_mtp_layers:
        kind = _build_kind(m, m.mtp_experts, m.mtp_layer_type(), m.mtp_window(), bounded=False)
        # Full recomputation covers all applications at once and saves the first input.
        times = m.num_mtp_layers if config.train.recompute is True else m.num_predictions
        kind_counts[kind] = kind_counts.get(kind, 0) + counts[-1] * times
    saved_by_kind = {kind: estimate_saved(config, row, kind) for kind in kind_counts}
    stored = {kind: count_stored_bytes(config, row, kind, saved) for kind, saved in saved_by_kind.items()}
    waiting = sum(stored[kind] * count for kind, count in kind_counts.items())
    if stage == 0:
        waiting += counts[0] * row // p.cp * INDEX_BYTES
    if config.gpu.cuda_graphs:
        waiting += _count_graph_bytes(config, stage, num_micro_batches)
    norms = _count_last_stage_bytes(config, row) if last else 0
    waiting += counts[-1] * norms
    recomputed = {}
    if config.train.recompute:
        recomputed = {kind: saved_by_kind[kind].total - stored[kind] for kind in kind_counts}
    if last and m.num_mtp_layers and config.train.recompute is True:
        recomputed[kind] = max(recomputed[kind], m.mtp_depths * saved_by_kind[kind].total - stored[kind])
    largest = max(kind_counts, key=lambda kind: saved_by_kind[kind].total)
    return StoredActivations(
        waiting=waiting, head=count_head_gradient_bytes(config, row) if last else 0,
        recomputed=max(recomputed.values(), default=0), norms=norms, largest=saved_by_kind[largest].total,
        unevenly=_count_expert_bytes(config, kind_counts, saved_by_kind),
        layer_unevenly=saved_by_kind[largest].routed)


def _count_graph_bytes(config: RunConfig, stage: int, num_micro_batches: int) -> int:
    """Return the bytes of the graphs of a stage's trunk layers, without the activations in them."""
    m, p = config.model, config.parallel
    layers = [layer for chunk in list_chunk_layers(p, stage, m.num_layers) for layer in chunk]
    num_layers = sum(list_layer_kinds(m)[layer].with_experts for layer in layers)
    has_order = p.pp > 1 or p.expert_overlap == "micro_batches"
    # forward, backward, and delayed weight gradients of shared experts
    return GRAPH_BYTES * num_layers * (num_micro_batches if has_order else 1) * (2 + p.delay_weight_grads)


def _count_expert_bytes(config: RunConfig, kind_counts: dict[LayerKind, int],
                        saved_by_kind: dict[LayerKind, SavedActivations]) -> int:
    """Return the routed tokens' bytes in `waiting`."""
    if config.train.recompute is True or "moe" in config.gpu.recompute_modules:
        return 0
    return sum(saved_by_kind[kind].routed * count for kind, count in kind_counts.items())


def _count_last_stage_bytes(config: RunConfig, row_tokens: int) -> int:
    """Return the bytes per micro-batch outside the last stage's layers: final norm, and per prediction layer
    three norms and a projection."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, fused = count_tokens(config, row_tokens), config.train.precision == "bf16"
    hidden = tokens.share * m.hidden_size * item
    norm = hidden if fused else 2 * hidden + tokens.share * item
    if not m.num_mtp_layers:
        return norm
    predictions = m.num_predictions * (3 * norm + 2 * hidden)
    if config.train.recompute is True:
        # hidden states, and embeddings per depth
        predictions = (m.num_mtp_layers + m.num_predictions) * hidden
    return norm + m.num_predictions * tokens.local * INDEX_BYTES + predictions


def count_head_gradient_bytes(config: RunConfig, row_tokens: int) -> int:
    """Return the gradient bytes that the losses compute in the forward pass: for all hidden states, and for
    the head's weight (`engine.model.chunked_head`)."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, wide = count_tokens(config, row_tokens), max(ITEM_BYTES[config.train.precision], FLOAT32_BYTES)
    rows = -(-m.vocab_size // config.parallel.tp)
    trained = not config.lora.on or HEAD in config.lora.targets
    weight_bytes = rows * m.hidden_size * wide if trained else 0
    return (1 + m.num_predictions) * (weight_bytes + tokens.local * (m.hidden_size * item + wide))
