"""List the parameters on a pipeline stage's process, in megatron-core's registration order (ZeRO-1 lays out
its buffers in this order, see `states`), and count quantized weights.

Names and global shapes come from the family's weight map. Shards follow megatron-core: tp splits attention,
dense networks, embedding and head; ep distributes experts and etp splits them; encoders are whole on every
process.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from megatron_sov.model.config import LoraConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_sov.model.families.adapters import PREFIX, AdaptedModule, find_adapted_modules
from megatron_sov.model.families.count import EMBEDDING, HEAD, layer_weights
from megatron_sov.model.families.encoders import encoder_shapes

ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes per weight or activation, by `train.precision`."""
FLOAT32_BYTES = 4
BF16_BYTES = 2
FP8_BLOCK = 128
"""Rows and columns per scale under `train.fp8=blockwise`."""
MX_VALUES, NVFP4_VALUES = 32, 16
"""Values per one-byte scale."""
SPLIT_BY_ROWS = ("linear_qkv", "linear_fc1", "linear_q_proj", "_up_proj", "eh_proj", "output_layer",
                 "word_embeddings", "self_attention.in_proj", "conv1d")
"""Layers whose weight and bias tensor parallelism splits by rows."""
SPLIT_BY_HEADS = ("softmax_offset", "dt_bias", "A_log")
"""Parameters with one number per head."""
SPLIT_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight", "self_attention.out_proj.weight")
"""Weights that tensor parallelism splits by columns."""
_ORDER = json.loads(Path(__file__).with_name("module_order.json").read_text(encoding="utf-8"))
"""Parts of parameter names, in the order in which Transformer Engine's modules register a layer."""


@dataclass(frozen=True)
class LocalParameter:
    """Consecutive parameters with equal shapes on a process."""

    key: str
    """The global tensor's name, with {l} for the layer."""
    shape: tuple[int, ...]
    count: int = 1
    """Number of parameters, e.g. local experts."""
    routed: bool = False
    """Whether these belong to routed experts, with replicas in the expert data-parallel group."""
    is_copied: bool = False
    """Whether the first and the last pipeline stage both have it."""

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


LayerParameters = tuple[int | None, tuple[LocalParameter, ...]]
"""A layer (0-based; None: outside the trunk) and its parameters."""


def list_stage_parameters(config: RunConfig, stage: int) -> list[list[LayerParameters]]:
    """Return the parameters on a process on pipeline stage `stage` (0-based), by chunk."""
    m, p = config.model, config.parallel
    # bf16 models use Transformer Engine's modules (`engine.model.specs.uses_transformer_engine`)
    fused = config.train.precision == "bf16"
    sizes = m, p.tp, p.ep, p.etp, fused
    # Layers with experts come last. Layers of a kind have equal parameters, so list only the kind's first.
    first_moe = m.num_layers - m.num_moe_layers()
    kinds = [(layer >= first_moe, kind == "linear_attention") for layer, kind in enumerate(m.layer_types())]
    chunks = []
    for chunk, layers in enumerate(list_chunk_layers(p, stage, m.num_layers)):
        # Only chunk 0 on stage 0 has the embedding.
        is_first = stage == 0 and chunk == 0
        is_last = stage == p.pp - 1 and chunk == p.vpp - 1
        parameters: list[LayerParameters] = []
        # Prediction layers embed the next token, so the last stage has the table as well.
        if is_first or (is_last and m.num_mtp_layers):
            parameters.append((None, (_build_table(m, p, EMBEDDING),)))
        parameters += [(layer, _list_layer(*sizes, kinds.index(kinds[layer]))) for layer in layers]
        if is_last:
            norm = LocalParameter("decoder.final_layernorm.weight", (m.hidden_size,))
            parameters.append((None, (norm,)))
            parameters += [(i, _list_layer(*sizes, None)) for i in range(m.num_mtp_layers)]
            # A single stage with tied embeddings already has the table.
            if not (is_first and m.tied_embeddings):
                parameters.append((None, (_build_table(m, p, EMBEDDING if m.tied_embeddings else HEAD),)))
        if is_first:
            parameters += _list_encoders(m)
        if config.lora.on:
            parameters += _iter_adapters(config, layers, is_first, is_last)
        chunks.append(parameters)
    return chunks


def list_chunk_layers(parallel: ParallelConfig, stage: int, num_layers: int) -> list[list[int]]:
    """Return the trunk's layers (0-based) on a stage, by chunk."""
    num_chunks = parallel.pp * parallel.vpp
    lengths = parallel.pipeline_layout or (num_layers // num_chunks,) * num_chunks
    return [list(range(sum(lengths[:chunk]), sum(lengths[:chunk + 1])))
            for chunk in range(stage, len(lengths), parallel.pp)]


@lru_cache(maxsize=16)
def _list_encoders(m: ModelConfig) -> tuple[LayerParameters, ...]:
    """Return the image and audio encoders, whole on every process."""
    return tuple((None, (LocalParameter(key, shape),)) for key, shape in encoder_shapes(m).items())


def _build_table(m: ModelConfig, p: ParallelConfig, key: str) -> LocalParameter:
    """Return the embedding or head, with rows padded to a multiple of `tp`; a tied head is `EMBEDDING`."""
    # Both copies need the summed gradient, so each copy has its own bucket.
    is_copied = key == EMBEDDING and p.pp > 1 and (m.tied_embeddings or m.num_mtp_layers > 0)
    return LocalParameter(key, (-(-m.vocab_size // p.tp), m.hidden_size), is_copied=is_copied)


def _find_position(key: str, fused: bool) -> tuple[int, int]:
    """Return a sort key for the registration order inside a layer."""
    # The first match counts, so `_ORDER` lists longer names before their prefixes.
    position = next((i for i, name in enumerate(_ORDER) if name in key), len(_ORDER))
    if fused or not key.endswith(".layer_norm_weight"):
        return position, 0
    # Without Transformer Engine, norms are modules before attention or after its projections.
    norms = {"attention.linear_qkv": "input_layernorm", "attention.in_proj": "input_layernorm",
             "mlp.linear_fc1": "pre_mlp_layernorm"}
    module = next((norm for linear, norm in norms.items() if linear in key), "self_attn_bda")
    return _ORDER.index(module), position - len(_ORDER)


@lru_cache(maxsize=256)
def _list_layer(m: ModelConfig, tp: int, ep: int, etp: int, fused: bool, layer: int | None
                ) -> tuple[LocalParameter, ...]:
    """Return a layer's parameters in registration order. `fused`: use Transformer Engine's modules, with
    norms inside linear layers, and all experts' first matrices before the second matrices; `layer`: layer in
    the trunk, None: a prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    weights = [weight for weight in layer_weights(m) if not weight.is_buffer
               and (weight.predicts if layer is None else layer in weight.layers)]
    weights.sort(key=lambda weight: _find_position(weight.key, fused))
    parameters: list[LocalParameter] = []
    for routed, group in itertools.groupby(weights, key=lambda weight: weight.num_experts > 0):
        size = etp if routed else tp
        shards = [LocalParameter(weight.key, _shard_shape(weight.key, weight.shape, size), routed=routed)
                  for weight in group]
        parameters += _repeat_experts(shards, m.num_experts // ep, fused) if routed else shards
    return tuple(parameters)


def _repeat_experts(parts: list[LocalParameter], count: int, fused: bool) -> list[LocalParameter]:
    """Return the parameters in `count` experts, given a single expert's parameters."""
    # Without grouped products an expert is a module, which registers its matrices.
    if not fused:
        return parts * count
    half = len(parts) // 2
    if half == 1:
        return [replace(part, count=count) for part in parts]
    return parts[:half] * count + parts[half:] * count


def _shard_shape(key: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return a parameter's local shape on `size` tensor-parallel processes."""
    linear, _, name = key.rpartition(".")
    # Fused norms have the name of a split linear layer, but are whole.
    if name == "layer_norm_weight":
        return shape
    if linear.endswith(SPLIT_BY_ROWS) or name in SPLIT_BY_HEADS:
        return (shape[0] // size, *shape[1:])
    return (shape[0], shape[1] // size) if key.endswith(SPLIT_BY_COLUMNS) else shape


def _iter_adapters(config: RunConfig, layers: list[int], is_first: bool, is_last: bool
                   ) -> Iterator[LayerParameters]:
    """Yield a chunk's adapters by layer, then adapters on embedding and head (`engine.model.adapters`)."""
    m, p, lora = config.model, config.parallel, config.lora
    by_linear = _group_adapted_modules(m, lora)
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        for linear, modules in by_linear.items():
            if linear.startswith(prefix):
                count = max(1, modules[0].num_experts // p.ep)
                factors = [factor for module in modules for factor in _list_factors(module, lora, p)]
                yield layer, tuple(factors) * count
    rows = -(-m.vocab_size // p.tp)
    for linear, is_present in (("embedding.word_embeddings", is_first), ("output_layer", is_last)):
        if is_present and linear in by_linear:
            yield None, _list_factors(by_linear[linear][0], lora, p, rows)


@lru_cache(maxsize=16)
def _group_adapted_modules(m: ModelConfig, lora: LoraConfig) -> dict[str, list[AdaptedModule]]:
    """Return linear layer -> its adapted modules."""
    groups: dict[str, list[AdaptedModule]] = {}
    for module in find_adapted_modules(m, lora):
        groups.setdefault(module.linear, []).append(module)
    return groups


def _list_factors(module: AdaptedModule, lora: LoraConfig, p: ParallelConfig, rows: int = 0
                  ) -> tuple[LocalParameter, ...]:
    """Return `lora_A`, `lora_B` and, under `lora.dora`, the row norms for an adapted module or expert
    (`engine.model.adapters.AdapterFactors`)."""
    # A split by rows splits B, a split by columns splits A.
    size = p.etp if module.num_experts else p.tp
    is_split_by_rows = module.linear.endswith(SPLIT_BY_ROWS)
    is_split_by_columns = f"{module.linear}.weight".endswith(SPLIT_BY_COLUMNS)
    height = rows or module.out_features // (size if is_split_by_rows else 1)
    width = module.in_features // (size if is_split_by_columns else 1)
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (lora.rank, width), "lora_B": (height, lora.rank)}
    if lora.dora:
        shapes["magnitude"] = (height,)
    return tuple(LocalParameter(module.key(name), shape, routed=bool(module.num_experts))
                 for name, shape in shapes.items())


def is_adapter(key: str) -> bool:
    return key.startswith(PREFIX)


# Transformer Engine stores quantized weights next to the bf16 weights under `train.fp8`, without bf16 weights
# under `train.fp8_weights`. In a step's first micro-batch it quantizes into persistent buffers
# (`_fp8_workspaces`, 2.20.2), or from master weights after each update: rowwise for the forward pass,
# columnwise for input gradients. Shapes follow its quantizers (`pytorch/tensor/*_tensor.py`: data and
# `get_scale_shape`).


def count_quantized_bytes(config: RunConfig, stage: int) -> int:
    """Return the quantized weights' bytes on a process on pipeline stage `stage` (0-based)."""
    return sum(part.count * count_weight_bytes(config.train.fp8, *part.shape)
               for part in iter_quantized(config, stage))


def count_replaced_bytes(config: RunConfig, stage: int, elements: int) -> int:
    """Return the bf16 bytes that `train.fp8_weights` saves on a process on a stage; `elements`: all weights
    on the process. Under mxfp8, megatron-core still has the buffer that gathers the remaining weights."""
    if not config.train.fp8_weights:
        return 0
    in_8_bits = sum(part.count * part.numel for part in iter_quantized(config, stage))
    return BF16_BYTES * (in_8_bits - (elements - in_8_bits if config.train.fp8 == "mxfp8" else 0))


def iter_quantized(config: RunConfig, stage: int) -> Iterator[LocalParameter]:
    """Yield the quantized weights on a process on a stage."""
    m, train = config.model, config.train
    if train.fp8 == "none":
        return
    layers_in_8_bits = range(train.fp8_bf16_layers_at_start, m.num_layers - train.fp8_bf16_layers_at_end)
    for layer, parts in itertools.chain.from_iterable(list_stage_parameters(config, stage)):
        if layer is None or is_adapter(parts[0].key):
            continue
        # nvfp4 keeps prediction layers in bf16
        is_prediction = parts[0].key.startswith("mtp.")
        if (train.fp8 != "nvfp4") if is_prediction else (layer in layers_in_8_bits):
            yield from (part for part in parts
                        if len(part.shape) == 2 and not part.key.endswith("router.weight"))


def count_weight_bytes(fp8: str, rows: int, columns: int) -> int:
    """Return the bytes for both quantized copies of a weight [rows, columns], scales included.

    `tensorwise` assumes Hopper, whose tensor cores need a transposed copy; Blackwell needs none.
    """
    numel = rows * columns
    if fp8 == "tensorwise":
        return 2 * numel + FLOAT32_BYTES
    if fp8 == "blockwise":
        down, across = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
        return 2 * numel + FLOAT32_BYTES * (down * round_up(across, 4) + across * round_up(down, 4))
    if fp8 == "mxfp8":
        return (2 * numel + round_up(rows, 128) * round_up(columns // MX_VALUES, 4)
                + round_up(rows // MX_VALUES, 4) * round_up(columns, 128))
    # nvfp4: two values per byte, and the tensor's maximum per copy
    return (numel + 2 * FLOAT32_BYTES + round_up(rows, 128) * round_up(-(-columns // NVFP4_VALUES), 4)
            + round_up(columns, 128) * round_up(-(-rows // NVFP4_VALUES), 4))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
