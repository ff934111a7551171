"""The parameters that a process of a pipeline stage holds, one by one, in the order in which the library
registers them: of it ZeRO-1's buffers are made (`states`).

Names and global shapes are those of the family's weight map.  Shapes are cut as megatron-core cuts them:
matrices of attention, dense layers, shared experts and vocabulary over `tp`, experts over `ep` and their
matrices over `etp`, layers over stages.  Norms and routers are whole on every process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_sov.model.config import LoraConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_sov.model.families.adapters import PREFIX, AdaptedModule, find_adapted_modules
from megatron_sov.model.families.count import EMBEDDING, HEAD, layer_weights
from megatron_sov.model.families.encoders import encoder_shapes
from megatron_sov.model.process_memory import StageParams

ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a weight or an activation, by `train.precision`."""
FLOAT32_BYTES = 4
BF16_BYTES = 2
FP8_BLOCK = 128
"""Rows and columns of a weight with one scale under `train.fp8=blockwise`."""
MX_VALUES, NVFP4_VALUES = 32, 16
"""Values with one scale of a byte."""
SPLIT_BY_ROWS = ("linear_qkv", "linear_fc1", "linear_q_proj", "_up_proj", "eh_proj", "output_layer",
                 "word_embeddings", "self_attention.in_proj", "conv1d")
"""Layers that tensor parallelism cuts by rows of their weight and bias."""
SPLIT_BY_HEADS = ("softmax_offset", "dt_bias", "A_log")
"""Parameters with a number for each head."""
SPLIT_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight", "self_attention.out_proj.weight")
"""Weights that it cuts by columns."""


@dataclass(frozen=True)
class LocalParameter:
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
        return math.prod(self.shape)


LayerParameters = tuple[int | None, tuple[LocalParameter, ...]]
"""A layer (0-based; None: none) and parameters of it."""


def list_stage_parameters(config: RunConfig, stage: int) -> list[list[LayerParameters]]:
    """Return what a process of a stage holds, by chunks of an interleaved pipeline."""
    m, p = config.model, config.parallel
    # Transformer Engine's modules make models in bf16 (`engine.model.specs.transformer_engine_serves`)
    fused = config.train.precision == "bf16"
    sizes = m, p.tp, p.ep, p.etp, fused
    # Layers with experts are the last ones; of layers alike the first one stands for all.
    first_moe = m.num_layers - m.num_moe_layers()
    alike = [(layer >= first_moe, kind == "linear_attention") for layer, kind in enumerate(m.layer_types())]
    chunks = []
    for turn, layers in enumerate(list_chunk_layers(p, stage, m.num_layers)):
        # Chunks of one stage are not neighbours in the model: only the first chunk of stage 0 embeds.
        first = stage == 0 and turn == 0
        last = stage == p.pp - 1 and turn == p.vpp - 1
        runs: list[LayerParameters] = []
        # Prediction layers embed the next token on the last stage, so the table is there as well.
        if first or (last and m.num_mtp_layers):
            runs.append((None, (_build_table(m, p, EMBEDDING),)))
        runs += [(layer, _list_layer(*sizes, alike.index(alike[layer]))) for layer in layers]
        if last:
            runs.append((None, (LocalParameter("decoder.final_layernorm.weight", (m.hidden_size,)),)))
            runs += [(i, _list_layer(*sizes, None)) for i in range(m.num_mtp_layers)]
            # One stage with tied embeddings already has the table above.
            if not (first and m.tied_embeddings):
                runs.append((None, (_build_table(m, p, EMBEDDING if m.tied_embeddings else HEAD),)))
        if first:
            runs += _list_encoders(m)
        if config.lora.on:
            runs += _iter_adapters(config, layers, first, last)
        chunks.append(runs)
    return chunks


def list_chunk_layers(parallel: ParallelConfig, stage: int, num_layers: int) -> list[list[int]]:
    """Return the trunk's layers (0-based) on a stage, by chunks."""
    runs = parallel.pipeline_layout or (num_layers // (parallel.pp * parallel.vpp),) * (
        parallel.pp * parallel.vpp)
    return [list(range(sum(runs[:run]), sum(runs[:run + 1]))) for run in range(stage, len(runs), parallel.pp)]


@lru_cache(maxsize=16)
def _list_encoders(m: ModelConfig) -> tuple[LayerParameters, ...]:
    """Return the encoders of pictures and sounds, whole on every process."""
    return tuple((None, (LocalParameter(key, shape),)) for key, shape in encoder_shapes(m).items())


def _build_table(m: ModelConfig, p: ParallelConfig, key: str) -> LocalParameter:
    """Return an embedding or head, whose rows are filled up to a multiple of `tp`; a tied head has the
    embedding's name."""
    # Both copies have to get the sum of both gradients, so they have a bucket of their own.
    copied = key == EMBEDDING and p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers > 0)
    return LocalParameter(key, (-(-m.vocab_size // p.tp), m.hidden_size), is_copied=copied)


_ORDER = (
    "enorm", "hnorm", "eh_proj", "input_layernorm", "softmax_offset", "linear_proj.weight",
    "linear_proj.bias", "linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_qkv.bias",
    "q_layernorm", "k_layernorm", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj.layer_norm_weight",
    "linear_q_up_proj.weight", "linear_kv_down_proj", "linear_kv_up_proj.layer_norm_weight",
    "linear_kv_up_proj.weight", "dt_bias", "A_log", "in_proj.layer_norm_weight", "in_proj.weight", "conv1d",
    "out_norm", "out_proj", "gates_down_proj", "decay_up_proj", "output_up_proj", "self_attn_bda",
    "pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_weight",
    "router.weight", "router.bias", "experts.experts.linear_fc1.weight", "experts.experts.linear_fc1.bias",
    "experts.experts.linear_fc2.weight", "experts.experts.linear_fc2.bias", "gate_weight", "linear_fc1",
    "linear_fc2", "mlp_bda", "final_layernorm")
"""Parts of names, in the order in which Transformer Engine's modules register the parameters of a layer."""


def _find_position(key: str, fused: bool) -> tuple[int, int]:
    """Return where in its layer a parameter is registered."""
    # The first match counts, so a longer name is in the table before a shorter one that it contains.
    at = next((i for i, name in enumerate(_ORDER) if name in key), len(_ORDER))
    if fused or not key.endswith(".layer_norm_weight"):
        return at, 0
    # without Transformer Engine a norm is a module of its own, before attention or behind its projections
    beside = {"attention.linear_qkv": "input_layernorm", "attention.in_proj": "input_layernorm",
              "mlp.linear_fc1": "pre_mlp_layernorm"}
    module = next((other for linear, other in beside.items() if linear in key), "self_attn_bda")
    return _ORDER.index(module), at - len(_ORDER)


@lru_cache(maxsize=256)
def _list_layer(m: ModelConfig, tp: int, ep: int, etp: int, fused: bool,
                layer: int | None) -> tuple[LocalParameter, ...]:
    """Return the parameters of a layer in their order.

    Args:
        m: model.
        tp: tensor parallel size.
        ep: expert parallel size.
        etp: tensor parallel size of experts.
        fused: whether Transformer Engine's modules make it, which have norms inside the linear layers behind
            them, and the first matrices of all experts before the second ones.
        layer: one of the trunk; None: a prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2).
    """
    weights = sorted((w for w in layer_weights(m) if not w.is_buffer and (
        w.predicts if layer is None else layer in w.layers)), key=lambda w: _find_position(w.key, fused))
    found: list[LocalParameter] = []
    for routed, group in itertools.groupby(weights, key=lambda w: w.num_experts > 0):
        parts = [LocalParameter(w.key, _shard_shape(
            w.key, w.shape, etp if routed else tp), routed=routed) for w in group]
        found += _repeat_experts(parts, m.num_experts // ep, fused) if routed else parts
    return tuple(found)


def _repeat_experts(parts: list[LocalParameter], count: int, fused: bool) -> list[LocalParameter]:
    """Return the parameters of so many routed experts, of which one has these."""
    # Without grouped products each expert is a module, which registers its own matrices in turn.
    if not fused:
        return parts * count
    half = len(parts) // 2
    if half == 1:
        return [replace(part, count=count) for part in parts]
    return parts[:half] * count + parts[half:] * count


def _shard_shape(key: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the part of a parameter that one of so many tensor-parallel processes holds."""
    linear, _, name = key.rpartition(".")
    # Fused norms have the name of a linear layer that is cut, and are whole themselves.
    if name == "layer_norm_weight":
        return shape
    if linear.endswith(SPLIT_BY_ROWS) or name in SPLIT_BY_HEADS:
        return (shape[0] // size, *shape[1:])
    return (shape[0], shape[1] // size) if key.endswith(SPLIT_BY_COLUMNS) else shape


def _iter_adapters(
    config: RunConfig,
    layers: list[int],
    first: bool,
     last: bool) -> Iterator[LayerParameters]:
    """Yield the adapters of a chunk, layer by layer, then those of embedding and head
    (`engine.model.adapters`)."""
    m, p, lora = config.model, config.parallel, config.lora
    by_linear = _group_adapted_modules(m, lora)
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        for linear, modules in by_linear.items():
            if linear.startswith(prefix):
                count = max(1, modules[0].num_experts // p.ep)
                yield layer, tuple(part for of in modules for part in _list_factors(of, lora, p)) * count
    rows = -(-m.vocab_size // p.tp)
    for linear, here in (("embedding.word_embeddings", first), ("output_layer", last)):
        if here and linear in by_linear:
            yield None, _list_factors(by_linear[linear][0], lora, p, rows)


@lru_cache(maxsize=16)
def _group_adapted_modules(m: ModelConfig, lora: LoraConfig) -> dict[str, list[AdaptedModule]]:
    """Return linear layer -> what of it is adapted."""
    found: dict[str, list[AdaptedModule]] = {}
    for of in find_adapted_modules(m, lora):
        found.setdefault(of.linear, []).append(of)
    return found


def _list_factors(of: AdaptedModule, lora: LoraConfig, p: ParallelConfig,
                  rows: int = 0) -> tuple[LocalParameter, ...]:
    """Return A, B and, under DoRA, the rows' lengths of one adapted module or expert
    (`engine.model.lora.Factors`)."""
    # Of A and B at most one is cut: B where the layer is cut by rows, A where it is cut by columns.
    size = p.etp if of.num_experts else p.tp
    by_rows = of.linear.endswith(SPLIT_BY_ROWS)
    height = rows or of.out_features // (size if by_rows else 1)
    width = of.in_features // (size if f"{of.linear}.weight".endswith(SPLIT_BY_COLUMNS) else 1)
    shapes = {"lora_A": (lora.rank, width), "lora_B": (height, lora.rank)} | (
        {"magnitude": (height,)} if lora.dora else {})
    return tuple(LocalParameter(of.key(name), shape, routed=bool(of.num_experts))
                 for name, shape in shapes.items())


def is_adapter(key: str) -> bool:
    return key.startswith(PREFIX)


def count_stage_params(config: RunConfig) -> list[StageParams]:
    """Return what a process of each stage holds; the layout has to fit the model."""
    found = []
    for stage in range(config.parallel.pp):
        parts = [part for runs in list_stage_parameters(config, stage) for _, here in runs for part in here]
        dense, experts = (sum(part.numel * part.count for part in parts if part.routed == routed)
                          for routed in (False, True))
        layers = len(config.parallel.stage_layers(stage, config.model.num_layers))
        if stage == config.parallel.pp - 1:
            layers += config.model.num_mtp_layers
        found.append(StageParams(dense, experts, layers))
    return found


# Quantised weights, which Transformer Engine keeps beside the bf16 ones under `train.fp8`, or in their place
# under `train.fp8_weights`.  It quantises a weight in the first micro-batch of a step into buffers that stay
# (`_fp8_workspaces`, 2.20.2), or makes it of its master behind each update: rowwise for
# the forward pass, columnwise for the gradients of inputs.  The shapes are those of its quantisers
# (`pytorch/tensor/*_tensor.py`: data, and `get_scale_shape`).


def count_quantized_bytes(config: RunConfig, stage: int) -> int:
    """Return the bytes on a process of pipeline stage `stage` (0-based); 0 where nothing is quantised."""
    return sum(part.count * count_weight_bytes(config.train.fp8, *part.shape)
               for part in iter_quantized(config, stage))


def count_replaced_bytes(config: RunConfig, stage: int, elements: int) -> int:
    """Return the bytes of weights in bf16 that `train.fp8_weights` does without on a process of a stage.

    Under mxfp8 megatron-core keeps the memory that other weights are gathered in beside them.

    Args:
        elements: of all weights of the process.
    """
    if not config.train.fp8_weights:
        return 0
    in_8_bits = sum(part.count * part.numel for part in iter_quantized(config, stage))
    return BF16_BYTES * (in_8_bits - (elements - in_8_bits if config.train.fp8 == "mxfp8" else 0))


def iter_quantized(config: RunConfig, stage: int) -> Iterator[LocalParameter]:
    """Yield the weights on a process of a stage that are quantised."""
    m, train = config.model, config.train
    if train.fp8 == "none":
        return
    in_8_bits = range(train.fp8_bf16_layers_at_start, m.num_layers - train.fp8_bf16_layers_at_end)
    for layer, parts in (run for runs in list_stage_parameters(config, stage) for run in runs):
        if layer is None or is_adapter(parts[0].key):
            continue
        # nvfp4 leaves the prediction layers in bf16
        if train.fp8 != "nvfp4" if parts[0].key.startswith("mtp.") else layer in in_8_bits:
            yield from (part for part in parts
                        if len(part.shape) == 2 and not part.key.endswith("router.weight"))


def count_weight_bytes(fp8: str, rows: int, columns: int) -> int:
    """Return what is kept of one weight [rows, columns] under a recipe, both of its forms.

    `tensorwise` is counted as on a Hopper, whose products want a transposed copy; Blackwell has none of it.
    """
    numbers = rows * columns
    if fp8 == "tensorwise":
        return 2 * numbers + FLOAT32_BYTES
    if fp8 == "blockwise":
        down, across = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
        return 2 * numbers + FLOAT32_BYTES * (down * round_up(across, 4) + across * round_up(down, 4))
    if fp8 == "mxfp8":
        return (2 * numbers + round_up(rows, 128) * round_up(columns // MX_VALUES, 4)
                + round_up(rows // MX_VALUES, 4) * round_up(columns, 128))
    # nvfp4: two values in a byte, and the largest value of the tensor for either form
    return (numbers + 2 * FLOAT32_BYTES + round_up(rows, 128) * round_up(-(-columns // NVFP4_VALUES), 4)
            + round_up(columns, 128) * round_up(-(-rows // NVFP4_VALUES), 4))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
