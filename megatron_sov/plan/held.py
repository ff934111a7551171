"""The parameters that a process of a pipeline stage holds, one by one, in the order in which the library
registers them: of it ZeRO-1's buffers are made (`buffers`).

Names are those of checkpoints.  Shapes are cut as megatron-core cuts them: matrices of attention, dense
layers,
shared experts and vocabulary over `tp`, experts over `ep` and their matrices over `etp`, layers over stages.
Norms and routers are whole on every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_sov.config import LatentAttentionConfig, LoraConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_sov.models.adapters import PREFIX, Adapted, adapted_modules
from megatron_sov.models.encoders import encoder_tensors

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TABLES = (EMBEDDING, HEAD)
"""Names of the weights with a row for each token id."""
SPLIT_BY_ROWS = ("linear_qkv", "linear_fc1", "output_layer", "word_embeddings")
"""Linear layers that tensor parallelism cuts by rows of their weight; the others it cuts by columns."""


@dataclass(frozen=True)
class Held:
    """Parameters of one shape that a process holds one behind the other."""

    key: str
    """Name of the global tensor; {l} stands for the layer."""
    shape: tuple[int, ...]
    """Of each, on this process."""
    count: int = 1
    """How many: the local experts."""
    routed: bool = False
    """Whether they are routed experts', whose copies are those of the expert data-parallel group."""
    is_copied: bool = False
    """Whether the first and the last pipeline stage hold it both."""

    @cached_property
    def numel(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)


Run = tuple[int | None, tuple[Held, ...]]
"""A layer (0-based; None: none) and parameters of it."""


def held(config: RunConfig, stage: int) -> list[list[Run]]:
    """Return what a process of a stage holds, by chunks of an interleaved pipeline."""
    m, p = config.model, config.parallel
    # Transformer Engine's modules make models in bf16 (`mcore.model.specs.transformer_engine_serves`)
    fused = config.train.precision == "bf16"
    sizes = m, p.tp, p.ep, p.etp, fused
    first_moe = m.num_layers - m.num_moe_layers()
    chunks = []
    for turn, layers in enumerate(chunk_layers(p, stage, m.num_layers)):
        first = stage == 0 and turn == 0
        last = stage == p.pp - 1 and turn == p.vpp - 1
        runs: list[Run] = []
        if first or (last and m.num_mtp_layers):
            runs.append((None, (_table(m, p, EMBEDDING),)))
        kinds = {kind: _layer(*sizes, kind) for kind in {layer >= first_moe for layer in layers}}
        runs += [(layer, kinds[layer >= first_moe]) for layer in layers]
        if last:
            runs.append((None, (Held("decoder.final_layernorm.weight", (m.hidden_size,)),)))
            runs += [(i, _prediction_layer(*sizes)) for i in range(m.num_mtp_layers)]
            if not (first and m.tied_embeddings):
                runs.append((None, (_table(m, p, EMBEDDING if m.tied_embeddings else HEAD),)))
        if first:
            runs += _encoders(m)
        if config.lora.on:
            runs += _adapters(config, layers, first, last)
        chunks.append(runs)
    return chunks


def chunk_layers(parallel: ParallelConfig, stage: int, num_layers: int) -> list[list[int]]:
    """Return the trunk's layers (0-based) on a stage, by chunks."""
    runs = parallel.pipeline_layout or (num_layers // (parallel.pp * parallel.vpp),) * (
        parallel.pp * parallel.vpp)
    return [list(range(sum(runs[:run]), sum(runs[:run + 1]))) for run in range(stage, len(runs), parallel.pp)]


@lru_cache(maxsize=16)
def _encoders(m: ModelConfig) -> tuple[Run, ...]:
    """Return the encoders of pictures and sounds, whole on every process."""
    return tuple((None, (Held(key, shape),)) for key, shape in encoder_tensors(m).items())


def _table(m: ModelConfig, p: ParallelConfig, key: str) -> Held:
    """Return an embedding or head, whose rows are filled up to a multiple of `tp`; a tied head has the
    embedding's name."""
    copied = key == EMBEDDING and p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers > 0)
    return Held(key, (-(-m.vocab_size // p.tp), m.hidden_size), is_copied=copied)


@lru_cache(maxsize=256)
def _layer(m: ModelConfig, tp: int, ep: int, etp: int, fused: bool, with_experts: bool) -> tuple[Held, ...]:
    """Return a layer of the trunk.

    Args:
        m: model.
        tp: tensor parallel size.
        ep: expert parallel size.
        etp: tensor parallel size of experts.
        fused: whether Transformer Engine's modules make it, which have norms inside the linear layers behind
            them, and the first matrices of all experts before the second ones.
        with_experts: whether it has experts.
    """
    prefix = "decoder.layers.{l}."
    return _block(m, tp, ep, etp, fused, prefix, with_experts)


def _block(m: ModelConfig, tp: int, ep: int, etp: int, fused: bool, prefix: str,
           with_experts: bool) -> tuple[Held, ...]:
    """Return a transformer layer whose parameters have a prefix; the rest as `_layer` has it."""
    before = (*_attention(m, tp, fused, prefix), *_norm_behind("self_attn_bda", m, prefix))
    last = _norm_behind("mlp_bda", m, prefix)
    if not with_experts:
        return (*before, *_dense(m, tp, fused, prefix), *last)
    shared = m.num_shared_experts * m.expert_ffn_dim
    between = () if m.block_norms == "post" else (_norm("pre_mlp_layernorm", m, prefix),)
    router = (Held(prefix + "mlp.router.weight", (m.num_experts, m.hidden_size)),
              *_bias(prefix + "mlp.router", m.num_experts, m))
    return (*before, *between, *router,
            *_experts(m, m.num_experts // ep, m.expert_ffn_dim // etp, fused, prefix),
            *(_swiglu(prefix + "mlp.shared_experts.", m.hidden_size, shared // tp) if shared else ()), *last)


def _bias(name: str, width: int, m: ModelConfig, *, routed: bool = False) -> tuple[Held, ...]:
    """Return a bias that has the place of `ModelConfig.linear_bias`."""
    return (Held(name + ".bias", (width,), routed=routed),) if m.linear_bias else ()


def _norm(name: str, m: ModelConfig, prefix: str) -> Held:
    return Held(f"{prefix}{name}.weight", (m.hidden_size,))


def _norm_behind(name: str, m: ModelConfig, prefix: str) -> tuple[Held, ...]:
    """Return the norm of a block's output, where there is one."""
    return () if m.block_norms == "pre" else (_norm(f"{name}.norm", m, prefix),)


def _attention(m: ModelConfig, tp: int, fused: bool, prefix: str) -> Iterator[Held]:
    """Yield attention, with the norm before it where there is one."""
    if m.latent_attention is not None:
        yield from _latent_attention(m, m.latent_attention, tp, fused, prefix)
        return
    heads = m.num_heads * m.head_dim // tp
    rows = heads + 2 * m.num_kv_heads * m.head_dim // tp
    norm = Held(prefix + "self_attention.linear_qkv.layer_norm_weight", (m.hidden_size,))
    prefix += "self_attention."
    if not fused and m.block_norms != "post":
        yield norm
    if m.attention_sinks:
        yield Held(prefix + "core_attention.softmax_offset", (m.num_heads // tp,))
    yield Held(prefix + "linear_proj.weight", (m.hidden_size, heads))
    yield from _bias(prefix + "linear_proj", m.hidden_size, m)
    if fused and m.block_norms != "post":
        yield norm
    yield Held(prefix + "linear_qkv.weight", (rows, m.hidden_size))
    if m.qkv_bias:
        yield Held(prefix + "linear_qkv.bias", (rows,))
    if m.qk_norm:
        yield Held(prefix + "q_layernorm.weight", (m.head_dim,))
        yield Held(prefix + "k_layernorm.weight", (m.head_dim,))


def _latent_attention(m: ModelConfig, latent: LatentAttentionConfig, tp: int, fused: bool,
                      prefix: str) -> Iterator[Held]:
    """Yield latent attention and the norm before it; projections to narrow vectors are whole on every
    process."""
    yield _norm("input_layernorm", m, prefix)
    prefix += "self_attention."
    queries = m.num_heads * latent.query_dim // tp
    both = m.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim) // tp
    yield Held(prefix + "linear_proj.weight", (m.hidden_size, m.num_heads * latent.v_head_dim // tp))
    norms = []
    for letter, rank, down, up in (("q", latent.q_lora_rank, latent.q_lora_rank or 0, queries),
                                   ("kv", latent.kv_lora_rank, latent.cached_dim, both)):
        if rank is None:
            yield Held(prefix + "linear_q_proj.weight", (queries, m.hidden_size))
            continue
        yield Held(f"{prefix}linear_{letter}_down_proj.weight", (down, m.hidden_size))
        norm = Held(f"{prefix}linear_{letter}_up_proj.layer_norm_weight", (rank,))
        if fused:
            yield norm
        else:
            norms.append(norm)
        yield Held(f"{prefix}linear_{letter}_up_proj.weight", (up, rank))
    yield from norms


def _dense(m: ModelConfig, tp: int, fused: bool, prefix: str) -> Iterator[Held]:
    """Yield a dense feed-forward network, with the norm before it where there is one: the same order,
    wherever that is."""
    if m.block_norms != "post":
        yield Held(prefix + "mlp.linear_fc1.layer_norm_weight", (m.hidden_size,))
    yield from _swiglu(prefix + "mlp.", m.hidden_size, m.dense_ffn_dim // tp)


def _swiglu(prefix: str, hidden: int, ffn: int, count: int = 1, *, routed: bool = False) -> tuple[Held, Held]:
    """Return gate and up projection, which are one weight, and the down projection."""
    return (Held(prefix + "linear_fc1.weight", (2 * ffn, hidden), count, routed),
            Held(prefix + "linear_fc2.weight", (hidden, ffn), count, routed))


def _experts(m: ModelConfig, count: int, ffn: int, fused: bool, prefix: str) -> tuple[Held, ...]:
    """Return so many routed experts."""
    prefix += "mlp.experts.experts."
    if fused and not m.linear_bias:
        return _swiglu(prefix, m.hidden_size, ffn, count, routed=True)
    first, second = _swiglu(prefix, m.hidden_size, ffn, routed=True)
    firsts = (first, *_bias(prefix + "linear_fc1", 2 * ffn, m, routed=True))
    seconds = (second, *_bias(prefix + "linear_fc2", m.hidden_size, m, routed=True))
    return (*firsts * count, *seconds * count) if fused else (*firsts, *seconds) * count


@lru_cache(maxsize=256)
def _prediction_layer(m: ModelConfig, tp: int, ep: int, etp: int, fused: bool) -> tuple[Held, ...]:
    """Return a multi-token prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    prefix = "mtp.layers.{l}."
    return (_norm("enorm", m, prefix), _norm("hnorm", m, prefix),
            Held(prefix + "eh_proj.weight", (m.hidden_size // tp, 2 * m.hidden_size)),
            *_block(m, tp, ep, etp, fused, prefix + "transformer_layer.", m.mtp_experts),
            _norm("final_layernorm", m, prefix))


def _adapters(config: RunConfig, layers: list[int], first: bool, last: bool) -> Iterator[Run]:
    """Yield the adapters of a chunk, layer by layer, then those of embedding and head
    (`mcore.model.adapters`)."""
    m, p, lora = config.model, config.parallel, config.lora
    by_linear = _adapted(m, lora)
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        for linear, modules in by_linear.items():
            if linear.startswith(prefix):
                count = max(1, modules[0].num_experts // p.ep)
                yield layer, tuple(part for of in modules for part in _factors(of, lora, p)) * count
    rows = -(-m.vocab_size // p.tp)
    for linear, here in (("embedding.word_embeddings", first), ("output_layer", last)):
        if here and linear in by_linear:
            yield None, _factors(by_linear[linear][0], lora, p, rows)


@lru_cache(maxsize=16)
def _adapted(m: ModelConfig, lora: LoraConfig) -> dict[str, list[Adapted]]:
    """Return linear layer -> what of it is adapted."""
    found: dict[str, list[Adapted]] = {}
    for of in adapted_modules(m, lora):
        found.setdefault(of.linear, []).append(of)
    return found


def _factors(of: Adapted, lora: LoraConfig, p: ParallelConfig, rows: int = 0) -> tuple[Held, ...]:
    """Return A, B and, under DoRA, the rows' lengths of one adapted module or expert
    (`mcore.model.lora.Factors`).

    Args:
        of: what is adapted.
        lora: rank and kind.
        p: layout.
        rows: of an embedding or head, this process's rows; 0: those of the module.
    """
    size = p.etp if of.num_experts else p.tp
    by_rows = of.linear.endswith(SPLIT_BY_ROWS)
    height = rows or of.out_features // (size if by_rows else 1)
    width = of.in_features // (1 if by_rows else size)
    shapes = {"lora_A": (lora.rank, width), "lora_B": (height, lora.rank)} | (
        {"magnitude": (height,)} if lora.dora else {})
    return tuple(Held(of.key(name), shape, routed=bool(of.num_experts)) for name, shape in shapes.items())


def is_adapter(key: str) -> bool:
    """Return whether a parameter is an adapter's."""
    return key.startswith(PREFIX)
