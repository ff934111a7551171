"""Bytes that a layer keeps for its backward pass, part by part, and what recomputing or offloading leaves.

Counted by what the modules save: Transformer Engine's in bf16 (its 2.20.2: a norm inside a linear layer its
input and its output, a linear layer its input, SwiGLU its input, fused attention queries, keys, values and
output), megatron-core's own and ours elsewhere (0.19.2; unfused, so that norms and SwiGLU save more; the
angles of rotations, which all layers share, are left out).  The second kind is measured in
`benchmarks/plan_activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_sov.model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, RunConfig
from megatron_sov.model.config.lora import HEAD
from megatron_sov.plan.footprint.stage_parameters import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, list_chunk_layers)

INDEX_BYTES = 8
DELTA_RULE_CHUNK = 64
"""Tokens of a chunk of linear attention (`engine.model.delta_rule`)."""
QUERY_BLOCK = 1024
"""Queries of a sliding layer whose mask torch's attention keeps at a time, without a fused kernel
(`engine.model.attention`)."""
FLOATS_PER_SCORE = 5
"""Float32 numbers of every router's score that stay: logits, scores, their shares, weights and the balancing
loss's.  Measured."""


@dataclass(frozen=True)
class SavedActivations:
    residuals: int = 0
    """Inputs of its norms over the residual's width; unfused ones also normed."""
    qkv_input: int = 0
    """Norm output that the projection to queries, keys and values takes."""
    qkv: int = 0
    """Queries, keys and values as projected."""
    rotated: int = 0
    """Queries and keys as attention takes them."""
    core: int = 0
    """What attention itself adds: its output and the sums of its softmax; without a fused kernel the masks of
    windows."""
    attended: int = 0
    """Input of the output projection, where that is not the core's own output."""
    gathered: int = 0
    """Keys and values of the whole row, under context parallelism."""
    ffn_input: int = 0
    """Norm output that the feed-forward network takes."""
    router: int = 0
    """Scores, choices and the order of tokens."""
    expert_input: int = 0
    """Routed tokens in the order of their experts."""
    expert_hidden: int = 0
    """Gate and up projection of routed experts."""
    expert_activated: int = 0
    """Their product, which the down projection takes; unfused with its factors."""
    shared: int = 0
    """Inside of the shared experts."""
    dense: int = 0
    """Inside of a dense feed-forward network."""

    @property
    def routed(self) -> int:
        return self.expert_input + self.expert_hidden + self.expert_activated

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class LayerKind(NamedTuple):
    with_experts: bool
    window: int
    """Of its attention, in tokens; 0: none."""
    rotates: bool
    bounded: bool = False
    """Whether its gate and up projections have a bound, which keeps what it was given."""
    is_linear: bool = False
    """Whether its attention is linear."""


@lru_cache(maxsize=64)
def list_layer_kinds(m: ModelConfig) -> tuple[LayerKind, ...]:
    first_moe = m.num_layers - m.num_moe_layers()
    return tuple(_build_kind(m, layer >= first_moe, kind, window, limit > 0) for layer, (kind,
                 window, limit) in enumerate(zip(m.layer_types(), m.windows(), m.limits(), strict=True)))


def get_prediction_kind(m: ModelConfig) -> LayerKind:
    """Return the kind of the layer inside a multi-token prediction layer."""
    return _build_kind(m, m.mtp_experts, m.mtp_layer_type(), m.mtp_window(), bounded=False)


def _build_kind(m: ModelConfig, with_experts: bool, attention: str, window: int, bounded: bool) -> LayerKind:
    return LayerKind(with_experts, window, attention == "sliding_attention" or m.rope_on_global, bounded,
                     attention == "linear_attention")


class Tokens(NamedTuple):
    """How many tokens of a micro-batch one process has."""

    row: int
    """Of the row that the processes of a context-parallel group share."""
    local: int
    share: int
    """Its own where sequence parallelism cuts them."""


def count_tokens(config: RunConfig, row_tokens: int) -> Tokens:
    """Return the tokens of a process, for a micro-batch of so many."""
    p = config.parallel
    # Context parallelism cuts the row first; sequence parallelism then cuts what tp ranks share.
    local = row_tokens // p.cp
    return Tokens(row_tokens, local, local // (p.tp if p.sp else 1))


def estimate_saved(config: RunConfig, row_tokens: int, kind: LayerKind) -> SavedActivations:
    """Return what a layer saves where nothing is recomputed, routing being even."""
    p = config.parallel
    # under auto nobody knows here whether the kernels will be there: plain torch keeps more
    by_kernels = config.gpu.linear_attention == "fla" and config.train.precision == "bf16"
    return _estimate_saved(config.model, config.train.precision, count_tokens(config, row_tokens), p.tp,
                           p.etp, p.cp, kind, by_kernels)


@lru_cache(maxsize=1 << 14)
def _estimate_saved(m: ModelConfig, precision: str, tokens: Tokens, tp: int, etp: int, cp: int,
           kind: LayerKind, by_kernels: bool) -> SavedActivations:
    """Return what `saved` says, from what it depends on."""
    item, fused = ITEM_BYTES[precision], precision == "bf16"
    hidden = tokens.share * m.hidden_size * item
    # torch's norm keeps its input, that divided by its length, and 1 / length
    norm = hidden if fused else 2 * hidden + tokens.share * item
    attention = _estimate_attention(m, precision, tokens, tp, cp, kind, by_kernels)
    # gate and up projection once more, as they were before their bound
    twice = 2 if kind.bounded else 1
    if not kind.with_experts:
        dense = m.dense_ffn_dim // tp
        inside = tokens.local * dense * item * ((1 if fused else 2) + 2 * twice)
        return SavedActivations(residuals=m.norms_per_layer() * norm, qkv_input=hidden,
                                ffn_input=hidden, **attention, dense=inside)
    shared = m.num_shared_experts * m.expert_ffn_dim // tp
    routed, inner = tokens.share * m.num_experts_per_token, m.expert_ffn_dim // etp
    # a process of an expert that is cut has the tokens of all processes that share it
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
    """Return what attention saves, by the names of `SavedActivations`."""
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
    # A window as long as the row is none, and needs no masks.
    slides = 0 < kind.window < tokens.row
    # the norm of each head's queries is of a copy, where these do not lie side by side
    copied = queries if m.qk_norm and m.num_kv_heads > tp else 0
    # the gate as it is projected, its sigmoid, and what it gives
    gate = tokens.local * queries * (2 * item + max(item, FLOAT32_BYTES)) if m.attention_output_gate else 0
    found = {"gathered": 0}
    if cp > 1:
        # A process has two pieces of a row, and each reaches one window back.
        reached = min(tokens.row, tokens.local + 2 * kind.window) if slides else tokens.row
        found["gathered"] = 2 * reached * keys * item
    if fused:
        return found | {"qkv": per_token * (queries + 2 * keys + copied) + gate,
                        "rotated": per_token * (queries + keys), "core": per_token * queries + sums}
    projected = per_token * (queries + 2 * keys)  # values are a part of it
    qkv = projected + gate + per_token * (copied + (queries + keys if m.qk_norm else 0))
    if cp > 1 and not slides:  # pieces attend to gathered keys, and do it again in the backward pass
        return found | {"qkv": qkv, "rotated": per_token * queries, "attended": per_token * queries}
    masks = _count_mask_elements(tokens.local, kind.window) * item if slides and cp == 1 else 0
    return found | {"qkv": qkv, "rotated": per_token * (queries + keys),
                    "core": per_token * queries + sums + masks, "attended": per_token * queries * slides}


def _estimate_latent_attention(m: ModelConfig, latent: LatentAttentionConfig,
                               precision: str, tokens: Tokens, tp: int, cp: int) -> dict[str, int]:
    """Return what latent attention saves: both narrow vectors before and behind their norms, then queries,
    keys and values of every head.  Not measured."""
    item, heads = ITEM_BYTES[precision], m.num_heads // tp
    per_token, narrow = tokens.local * item, latent.kv_lora_rank + (latent.q_lora_rank or 0)
    # without a fused kernel, values are as wide as queries
    values = heads * (latent.v_head_dim if precision == "bf16" and cp == 1 else latent.query_dim)
    return {"gathered": 2 * tokens.row * heads * latent.query_dim * item if cp > 1 else 0,
            "qkv": tokens.share * item * (2 * narrow + latent.qk_rope_head_dim),
            "rotated": per_token * (2 * heads * latent.query_dim + values),
            "core": per_token * values + tokens.local * heads * max(item, FLOAT32_BYTES),
            "attended": per_token * heads * latent.v_head_dim}


def _estimate_linear_attention(linear: LinearAttentionConfig, precision: str, tokens: Tokens, tp: int
                      ) -> dict[str, int]:
    """Return what linear attention saves in plain torch: what is projected; in the precision of the state
    each tap's inputs, and these mixed, before and behind their activation; between a chunk's tokens three
    squares of each head, whose products take both sides in halves, both sides of the system, the states;
    output, norm and gate."""
    item, wide = ITEM_BYTES[precision], max(ITEM_BYTES[precision], FLOAT32_BYTES)
    channels = linear.num_key_heads * linear.convolved_channels // tp
    heads, keys, values = linear.num_key_heads // tp, linear.key_head_dim, linear.value_head_dim
    projected = (tokens.local * heads * (sum(linear.projected) + keys + values)
                 + tokens.share * 2 * linear.gate_rank)
    inside = heads * (3 * DELTA_RULE_CHUNK + 23 * keys + 3 * values + 4) + \
                      linear.state_size // tp // DELTA_RULE_CHUNK
    return {"gathered": 0, "qkv": projected * item,
            "rotated": tokens.local * wide * channels * (linear.conv_taps + 2),
            "core": tokens.local * wide * inside,
            "attended": tokens.local * heads * values * ((4 if item == wide else 5) * wide + item)}


def _estimate_fla_attention(linear: LinearAttentionConfig, tokens: Tokens, tp: int) -> dict[str, int]:
    """Return what linear attention saves in bf16 with the kernels of flash-linear-attention (fla-core 0.6.0,
    `save_for_backward` of its `chunk.py`): queries, keys and values in bf16, learning rates, decays and their
    sums in float32, and two squares of each head and chunk.  What is around them is as in plain torch."""
    item, wide = BF16_BYTES, FLOAT32_BYTES
    channels = linear.num_key_heads * linear.convolved_channels // tp
    heads, keys, values = linear.num_key_heads // tp, linear.key_head_dim, linear.value_head_dim
    # beside them the lengths of queries and keys, and what rates and decays are made of
    inside = heads * ((2 * keys + values + 2 * DELTA_RULE_CHUNK) * item + (4 * keys + 5) * wide)
    return {"gathered": 0, "qkv": tokens.share * 2 * linear.gate_rank * item,
            "rotated": tokens.local * wide * channels * (linear.conv_taps + 2),
            "core": tokens.local * inside,
            "attended": tokens.local * heads * values * (4 * wide + item)}


def _count_mask_elements(tokens: int, window: int) -> int:
    """Return the numbers in the masks of a row of one document under a sliding window."""
    return sum(min(QUERY_BLOCK, tokens - start) * (min(tokens, start + QUERY_BLOCK)
                                                   - max(0, start - window + 1))
               for start in range(0, tokens, QUERY_BLOCK))


def count_stored_bytes(config: RunConfig, row_tokens: int, kind: LayerKind, whole: SavedActivations) -> int:
    """Return how many bytes of a layer stay on the device until its backward pass, under `train.recompute`
    and `gpu.offload_modules`.

    Args:
        config: settings.
        row_tokens: tokens of a micro-batch, before it is cut over processes.
        kind: of the layer.
        whole: what it saves (`saved`).
    """
    # Full recomputation keeps the layer's input and nothing else.
    if config.train.recompute is True:
        return count_tokens(config, row_tokens).share * config.model.hidden_size * (
            ITEM_BYTES[config.train.precision])
    return whole.total - _count_recomputed_bytes(config, whole, kind) - \
                                                 _count_offloaded_bytes(config, whole, kind)


def _count_recomputed_bytes(config: RunConfig, whole: SavedActivations, kind: LayerKind) -> int:
    """Return what of a layer `gpu.recompute_modules` computes again."""
    modules, found = config.gpu.recompute_modules, 0
    fused = config.train.precision == "bf16"
    # a fused one keeps what its recomputation would need, and linear attention is not computed again
    if "core_attn" in modules and not fused and not kind.is_linear:
        found += whole.core
    if "mlp" in modules:
        found += whole.dense
    # The whole block is computed again, so its parts must not be counted once more below.
    if "moe" in modules:
        return found + whole.router + whole.routed + whole.shared
    if "layernorm" in modules and kind.with_experts and config.model.block_norms != "post":
        found += whole.ffn_input  # all other norms are a part of the linear layer behind them
    if "moe_act" in modules:
        found += whole.expert_activated
    return found + (whole.shared if "shared_experts" in modules else 0)


def _count_offloaded_bytes(config: RunConfig, whole: SavedActivations, kind: LayerKind) -> int:
    """Return what of a layer waits in host memory."""
    again, m = config.gpu.recompute_modules, config.model
    before_ffn = 0 if m.block_norms == "post" else whole.residuals // m.norms_per_layer()
    parts = {"qkv_linear": whole.qkv_input, "core_attn": whole.qkv, "attn_proj": whole.core,
             "mlp_norm": before_ffn, "expert_fc1": whole.expert_input,
             "moe_act": whole.expert_hidden // (2 if kind.bounded else 1)}
    if kind.is_linear:  # the library's modules of attention alone send their inputs to the host
        parts |= dict.fromkeys(("qkv_linear", "core_attn", "attn_proj"), 0)
    return sum(parts[module] for module in config.gpu.offload_modules
               if not ("moe" in again and module in ("expert_fc1", "moe_act")))


# What waits on a pipeline stage for the backward pass: micro-batches under way, and what each of them
# keeps.


def count_pending_micro_batches(pp: int, vpp: int, stage: int, num_micro_batches: int, *, overlapped: bool =
                                False ) -> list[int]:
    """Return how many micro-batches wait at most for the backward pass of each of a stage's chunks.

    1F1B (arXiv 2104.04473, section 2.2), interleaved (section 2.3): forward passes run ahead by the library's
    number (`schedules.get_pp_rank_microbatches`, 0.19.2), in groups of `pp` for each chunk.

    Args:
        pp: pipeline stages.
        vpp: chunks of each.
        stage: 0-based.
        num_micro_batches: of a step, on each replica.
        overlapped: whether the backward pass of one runs beside the forward pass of the next one.
    """
    if vpp == 1:
        return [min(pp - stage + overlapped, num_micro_batches)]
    # Forward passes before the first backward pass of this stage, over all of its chunks.
    ahead = min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1 + overlapped, num_micro_batches * vpp)
    # A round gives each chunk `pp` micro-batches in turn; the rest fills chunks from the first one on.
    rounds, rest = divmod(ahead, pp * vpp)
    return [rounds * pp + min(pp, max(0, rest - chunk * pp)) for chunk in range(vpp)]


@dataclass(frozen=True)
class StoredActivations:
    waiting: int
    """Kept by layers, embedding and prediction layers for the backward pass, of all micro-batches under
    way."""
    head: int
    """What a loss leaves for its backward pass: gradients of hidden states and of the head's weight."""
    recomputed: int
    """What the largest layer saves anew while it is computed again; 0: nothing is."""
    norms: int
    """Of `waiting`, what the newest micro-batch keeps behind the trunk's layers, and lets go before any of
    them is computed again."""
    largest: int
    """What the largest layer saves where nothing is recomputed."""
    unevenly: int
    """Of `waiting`, what routed experts keep: more, where routing is uneven."""
    layer_unevenly: int
    """The same of `recomputed`."""

    @property
    def saved(self) -> int:
        # The head's gradients and a recomputed layer are never there together, so the larger one counts.
        return self.waiting + max(self.head, self.recomputed - self.norms)


def estimate_stored(config: RunConfig, stage: int, seq_len: int, num_micro_batches: int) -> StoredActivations:
    """Return what a process of a stage keeps."""
    m, p = config.model, config.parallel
    row = seq_len * config.train.micro_batch_size
    of_layers = list_layer_kinds(m)
    counts = count_pending_micro_batches(
        p.pp, p.vpp, stage, num_micro_batches, overlapped=p.expert_overlap == "micro_batches")
    last = stage == p.pp - 1
    here: dict[LayerKind, int] = {}
    for layers, count in zip(list_chunk_layers(p, stage, m.num_layers), counts, strict=True):
        for layer in layers:
            # Layers of a kind save the same, so they are counted, not listed: a model has few kinds.
            here[of_layers[layer]] = here.get(of_layers[layer], 0) + count
    if last and m.num_mtp_layers:
        kind = get_prediction_kind(m)
        # Recomputed, all applications of the layer are one: it keeps what the first one was given.
        times = m.num_mtp_layers if config.train.recompute is True else m.num_predictions
        here[kind] = here.get(kind, 0) + counts[-1] * times
    wholes = {kind: estimate_saved(config, row, kind) for kind in here}
    keeps = {kind: count_stored_bytes(config, row, kind, whole) for kind, whole in wholes.items()}
    waiting = sum(keeps[kind] * count for kind, count in here.items())
    if stage == 0:
        waiting += counts[0] * row // p.cp * INDEX_BYTES
    norms = _count_last_stage_bytes(config, row) if last else 0
    waiting += counts[-1] * norms
    again = {kind: wholes[kind].total - keeps[kind] for kind in here} if config.train.recompute else {}
    if last and m.num_mtp_layers and config.train.recompute is True:
        again[kind] = max(again[kind], m.mtp_depths * wholes[kind].total - keeps[kind])
    largest = max(here, key=lambda kind: wholes[kind].total)
    return StoredActivations(waiting=waiting, head=count_head_gradient_bytes(config, row) if last else 0,
                  recomputed=max(again.values(), default=0), norms=norms, largest=wholes[largest].total,
                  unevenly=_count_expert_bytes(config, here, wholes),
                  layer_unevenly=wholes[largest].routed if again.get(largest) else 0)


def _count_expert_bytes(config: RunConfig, here: dict[LayerKind, int],
                wholes: dict[LayerKind, SavedActivations]) -> int:
    """Return the bytes of routed tokens among what waits."""
    if config.train.recompute is True or "moe" in config.gpu.recompute_modules:
        return 0
    return sum(wholes[kind].routed * count for kind, count in here.items())


def _count_last_stage_bytes(config: RunConfig, row_tokens: int) -> int:
    """Return what the last stage keeps of a micro-batch beside layers: final norm, and around a prediction
    layer three norms and the projection of two states to one."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, fused = count_tokens(config, row_tokens), config.train.precision == "bf16"
    hidden = tokens.share * m.hidden_size * item
    norm = hidden if fused else 2 * hidden + tokens.share * item
    if not m.num_mtp_layers:
        return norm
    around = m.num_predictions * tokens.local * INDEX_BYTES + (
        # recomputed, a prediction layer keeps its inputs: states, and embeddings of each depth
        (m.num_mtp_layers + m.num_predictions) * hidden if config.train.recompute is True
        else m.num_predictions * (3 * norm + 2 * hidden))
    return norm + around


def count_head_gradient_bytes(config: RunConfig, row_tokens: int) -> int:
    """Return what the head's losses leave in the forward pass: the gradient of every hidden state, of whole
    rows under tensor parallelism, and that of the head's weight (`engine.model.chunked_head`)."""
    m, item = config.model, ITEM_BYTES[config.train.precision]
    tokens, wide = count_tokens(config, row_tokens), max(ITEM_BYTES[config.train.precision], FLOAT32_BYTES)
    rows = -(-m.vocab_size // config.parallel.tp)
    trained = not config.lora.on or HEAD in config.lora.targets
    of_weight = rows * m.hidden_size * wide if trained else 0
    return (1 + m.num_predictions) * (of_weight + tokens.local * (m.hidden_size * item + wide))
