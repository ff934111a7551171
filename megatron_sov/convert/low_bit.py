"""Weights in 8 and 4 bits: what each format stores of a weight, how it is read, and how it is made.

A weight is a matrix [outputs, inputs], or gpt-oss's [experts, inputs, outputs]. What is read is in bfloat16.
All scales that are written are powers of two (those of NVFP4: of four bits, times one), so that a product
with them has at most 8 significant bits: bfloat16 has it exactly, whichever reader computes it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.writer import SAFETENSORS_DTYPES, TensorFile, TensorSpec
from megatron_sov.convert.dtypes import convert_tensor
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.weights import Link

FIELD = "quantization_config"
EIGHT_BITS = "F8_E4M3"
"""The dtype's name in safetensors' headers."""
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
Stored = dict[str, torch.Tensor]
"""What is stored of a weight: suffix of its name -> tensor."""
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Suffix -> shape and dtype."""


@dataclass(frozen=True)
class LowBitFormat:
    """One way to store a weight in fewer bits."""

    name: str
    """As `--quantize` has it."""
    field: dict[str, Any]
    """What `quantization_config` says, but for the modules that are kept."""
    kept: str
    """The field that lists these modules."""
    group: int
    """Inputs that must divide those of a weight."""
    sizes: Callable[[tuple[int, ...]], Sizes]
    """Return what is stored of a weight of that shape."""
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]
    """Return the weight's shape from those of what is stored."""
    pack: Callable[[torch.Tensor, float], Stored]
    """Return what is stored of a float32 weight, given the largest number of all that share its scale."""
    unpack: Callable[[Stored], torch.Tensor]
    """Return the weight in bfloat16."""
    largest_error: float
    """Limit of the norm of what rounding changes of a weight, in norms of the weight: half a step at the
    lower end of an octave."""
    shares: bool = False
    """Whether weights that engines join (query, key and value; gate and up) share a scale."""


@dataclass(frozen=True)
class LowBitWeight:
    """A weight that files hold in few bits."""

    name: str
    form: LowBitFormat
    held: Mapping[str, TensorFile]
    """Suffix -> the file that holds that part."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape({suffix: file.entries[self.name + suffix].shape
                                for suffix, file in self.held.items()})

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        return {file.path.name for file in self.held.values()}

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name + suffix for suffix in self.held)

    def read(self) -> torch.Tensor:
        """Return the weight in bfloat16; `UserError` where a file is damaged, or a scale is no number."""
        dtypes = {suffix: dtype for suffix, (_, dtype) in self.form.sizes(self.shape).items()}
        try:
            return self.form.unpack({suffix: file.read(self.name + suffix, dtype=dtypes[suffix])
                                     for suffix, file in self.held.items()})
        except ValueError as e:
            file = next(iter(self.held.values())).path
            raise UserError(f"{file}: {self.name}{e}; take weights from before the model broke") from None


# Numbers.


def power_of_two(numbers: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two that are not below positive float32 numbers; 1 for 0."""
    fraction, exponent = torch.frexp(numbers)
    exponent = (exponent - (fraction == 0.5).int()).clamp(min=-126)
    return torch.where(numbers > 0, torch.ldexp(torch.ones_like(numbers), exponent), 1.0)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Number of each 4 bits."""
BLOCKS_AT_A_TIME = 1 << 13
"""Blocks that are unpacked at a time: what fits a core's cache."""


@cache
def _bounds() -> torch.Tensor:
    """Return the upper ends [7] of the numbers that round to each E2M1 but the last: a number halfway goes to
    the one whose last bit is 0."""
    numbers = torch.tensor(E2M1[:8])
    halfway = (numbers[1:] + numbers[:-1]) / 2
    odd = torch.arange(7) % 2 == 1
    return torch.where(odd, torch.nextafter(halfway, torch.zeros(7)), halfway)


def nibbles(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers [rows, columns] rounded to E2M1, two in a byte, the lower half first:
    [rows, columns / 2] uint8."""
    found = torch.bucketize(numbers.abs(), _bounds()).to(torch.uint8)
    found |= torch.signbit(numbers).to(torch.uint8) << 3
    return found[:, 0::2] | found[:, 1::2] << 4


@cache
def _pairs() -> torch.Tensor:
    """Return for each byte its two numbers in bfloat16, side by side as one integer: [256] int32."""
    numbers, byte = torch.tensor(E2M1, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1).view(torch.int32).flatten()


# FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 is released: the number that each block is
# multiplied with (its `inference/fp8_cast_bf16.py`). The product is rounded to bfloat16, as it is there.

BLOCK = 128
"""Rows and columns of a weight with one scale."""
SUFFIX = "_scale_inv"


def _block_sizes(shape: tuple[int, ...]) -> Sizes:
    return {"": (shape, torch.float8_e4m3fn),
            SUFFIX: (tuple(-(-n // BLOCK) for n in shape), torch.float32)}


def _pack_blocks(weight: torch.Tensor, _: float) -> Stored:
    columns, sizes = weight.shape[1], _block_sizes(tuple(weight.shape))
    numbers, scales = (torch.empty(shape, dtype=dtype) for shape, dtype in sizes.values())
    for row in range(len(scales)):
        strip = slice(row * BLOCK, (row + 1) * BLOCK)
        largest = torch.nn.functional.pad(weight[strip].abs().amax(0), (0, -columns % BLOCK))
        scales[row] = power_of_two(largest.view(-1, BLOCK).amax(1) / LARGEST_E4M3)
        numbers[strip] = (weight[strip] / scales[row].repeat_interleave(BLOCK)[:columns]).to(numbers.dtype)
    return {"": numbers, SUFFIX: scales}


def _unpack_blocks(stored: Stored) -> torch.Tensor:
    numbers, found = stored[""], torch.empty(stored[""].shape, dtype=torch.bfloat16)
    for row, scales in enumerate(stored[SUFFIX]):
        strip = slice(row * BLOCK, (row + 1) * BLOCK)
        found[strip] = numbers[strip].float() * scales.repeat_interleave(BLOCK)[:numbers.shape[1]]
    return found


FP8_BLOCK = LowBitFormat(
    "fp8-block", {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                  "weight_block_size": [BLOCK, BLOCK]}, "modules_to_not_convert", 1,
    _block_sizes, lambda shapes: shapes[""], _pack_blocks, _unpack_blocks, 1 / 16)


# The formats of the library compressed-tensors (its `compressors`), which transformers, vLLM and SGLang read.


def _compressed(name: str, bits: int, activations: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    common = {"num_bits": bits, "type": "float", "symmetric": True}
    return {"quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": {**common, "dynamic": False, **weights},
                "input_activations": activations and {**common, **activations}}}}


SCALE, PACKED, GLOBAL = "_scale", "_packed", "_global_scale"


def _pack_tensor(weight: torch.Tensor, largest: float) -> Stored:
    scale = power_of_two(torch.tensor([largest / LARGEST_E4M3]))
    return {"": (weight / scale).to(torch.float8_e4m3fn), SCALE: scale}


FP8_TENSOR = LowBitFormat(
    "fp8-tensor", _compressed("float-quantized", 8, {"strategy": "token", "dynamic": True},
                              strategy="tensor"), "ignore", 1,
    lambda shape: {"": (shape, torch.float8_e4m3fn), SCALE: ((1,), torch.float32)},
    lambda shapes: shapes[""], _pack_tensor,
    lambda stored: (stored[""].float() * stored[SCALE]).bfloat16(), 1 / 16, shares=True)


# MXFP4: blocks of 32 numbers of 4 bits that share a scale (OCP Microscaling Formats v1.0, sections 5.2 and
# 5.3), two numbers (E2M1) in a byte, the lower half first; scales are powers of two with an offset of 127
# (E8M0). gpt-oss stores a weight NAME [experts, inputs, outputs] as NAME_blocks [experts, outputs,
# inputs / 32, 16] and NAME_scales [experts, outputs, inputs / 32]. Numbers come out in bfloat16, which has
# all of them but those below its range; transformers makes the same.

BLOCKS, SCALES = "_blocks", "_scales"
PER_BLOCK = 32
"""Numbers that share a scale."""
OFFSET, NOT_A_NUMBER = 127, 255


@cache
def _factors() -> torch.Tensor:
    """Return the factor of each scale, [255] bfloat16, which has all of them."""
    return torch.ldexp(torch.ones(NOT_A_NUMBER), torch.arange(NOT_A_NUMBER) - OFFSET).bfloat16()


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers of blocks: [..., groups, bytes] and [..., groups] uint8 -> [..., groups x bytes x 2]
    bfloat16."""
    rows, exponents = blocks.flatten(0, -2), scales.flatten()
    out = torch.empty(len(rows), 2 * rows.shape[1], dtype=torch.bfloat16)
    for start in range(0, len(rows), BLOCKS_AT_A_TIME):
        part = slice(start, start + BLOCKS_AT_A_TIME)
        numbers = _pairs().index_select(0, rows[part].flatten().int()).view(torch.bfloat16)
        torch.mul(numbers.view(out[part].shape), _factors()[exponents[part].int(), None], out=out[part])
    return out.reshape(*blocks.shape[:-2], -1)


def _microscaled(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers [rows, inputs] as bytes [rows, inputs / 2] and scales [rows, inputs / 32], uint8.

    A block's largest number lies in [4, 8) of its scale, but in [3.5, 4) where it would lie in [7, 8): so
    none is changed by more than half of the largest step, though 6 is the largest number.
    """
    blocks = rows.view(len(rows), -1, PER_BLOCK)
    largest = blocks.abs().amax(-1)
    fraction, exponent = torch.frexp(largest)  # largest = fraction x 2 ** exponent, fraction in [1/2, 1)
    exponent = exponent - 3 + (fraction >= 7 / 8).int()
    scales = torch.where(largest > 0, exponent + OFFSET, OFFSET).clamp(0, NOT_A_NUMBER - 1)
    numbers = torch.ldexp(blocks, OFFSET - scales[..., None])
    return nibbles(numbers.view(rows.shape)), scales.to(torch.uint8)


def _refuse_no_scale(scales: torch.Tensor, suffix: str) -> None:
    if bool((scales == NOT_A_NUMBER).any()):
        raise ValueError(f"{suffix} holds {NOT_A_NUMBER}, which is no number in E8M0")


def _pack_mxfp4(weight: torch.Tensor, _: float) -> Stored:
    return dict(zip((PACKED, SCALE), _microscaled(weight), strict=True))


def _unpack_mxfp4(stored: Stored) -> torch.Tensor:
    _refuse_no_scale(stored[SCALE], SCALE)
    return unpacked(stored[PACKED].unflatten(1, (-1, PER_BLOCK // 2)), stored[SCALE])


def _pack_experts(weight: torch.Tensor, _: float) -> Stored:
    experts, inputs, outputs = weight.shape
    numbers, scales = _microscaled(weight.transpose(1, 2).reshape(-1, inputs))
    shape = (experts, outputs, inputs // PER_BLOCK)
    return {BLOCKS: numbers.view(*shape, PER_BLOCK // 2), SCALES: scales.view(shape)}


def _unpack_experts(stored: Stored) -> torch.Tensor:
    _refuse_no_scale(stored[SCALES], SCALES)
    return unpacked(stored[BLOCKS], stored[SCALES]).transpose(1, 2)


def _expert_sizes(shape: tuple[int, ...]) -> Sizes:
    scales = (shape[0], shape[2], shape[1] // PER_BLOCK)
    return {BLOCKS: ((*scales, PER_BLOCK // 2), torch.uint8), SCALES: (scales, torch.uint8)}


def _packed_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    outputs, pairs = shapes[PACKED]
    return outputs, 2 * pairs


MXFP4 = LowBitFormat(
    "mxfp4", _compressed("mxfp4-pack-quantized", 4, None, strategy="group", group_size=PER_BLOCK,
                         scale_dtype="torch.uint8", zp_dtype="torch.uint8"), "ignore", PER_BLOCK,
    lambda shape: {PACKED: ((shape[0], shape[1] // 2), torch.uint8),
                   SCALE: ((shape[0], shape[1] // PER_BLOCK), torch.uint8)},
    _packed_shape, _pack_mxfp4, _unpack_mxfp4, 1 / 4)
MXFP4_EXPERTS = LowBitFormat(
    "mxfp4", {"quant_method": "mxfp4"}, "modules_to_not_convert", PER_BLOCK, _expert_sizes,
    lambda shapes: (shapes[BLOCKS][0], shapes[BLOCKS][2] * PER_BLOCK, shapes[BLOCKS][1]),
    _pack_experts, _unpack_experts, 1 / 4)


# NVFP4: blocks of 16 numbers of 4 bits that share a scale of 8 bits (E4M3), which the scale of the whole
# weight divides.

SIXTEEN = 16
"""Numbers that share a scale."""


def _pack_nvfp4(weight: torch.Tensor, largest: float) -> Stored:
    whole = 1 / power_of_two(torch.tensor([largest / LARGEST_E2M1 / LARGEST_E4M3]))
    blocks = weight.view(len(weight), -1, SIXTEEN)
    scales = (blocks.abs().amax(-1) / LARGEST_E2M1 * whole).to(torch.float8_e4m3fn)
    # a block far below the weight's largest number has a scale of 0, and numbers of 0
    steps = torch.where(scales.float() > 0, scales.float() / whole, math.inf)
    return {PACKED: nibbles((blocks / steps[..., None]).view(weight.shape)), SCALE: scales, GLOBAL: whole}


def _unpack_nvfp4(stored: Stored) -> torch.Tensor:
    numbers = _pairs()[stored[PACKED].int()].view(torch.bfloat16).float()
    scales = stored[SCALE].float() / stored[GLOBAL]
    found = numbers.unflatten(1, (-1, SIXTEEN)) * scales[..., None]
    return found.flatten(1).bfloat16()


NVFP4 = LowBitFormat(
    "nvfp4", _compressed("nvfp4-pack-quantized", 4, None, strategy="tensor_group", group_size=SIXTEEN,
                         scale_dtype="torch.float8_e4m3fn", zp_dtype="torch.float8_e4m3fn"), "ignore",
    SIXTEEN,
    lambda shape: {PACKED: ((shape[0], shape[1] // 2), torch.uint8),
                   SCALE: ((shape[0], shape[1] // SIXTEEN), torch.float8_e4m3fn),
                   GLOBAL: ((1,), torch.float32)},
    _packed_shape, _pack_nvfp4, _unpack_nvfp4, 1 / 4, shares=True)

FORMATS = {form.name: form for form in (FP8_BLOCK, FP8_TENSOR, MXFP4, NVFP4)}


# Reading: the weights of a folder that stand in few bits, found and checked from headers alone.


def low_bit_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    """Return the weights of a folder that stand in few bits, by name.

    Args:
        config: the parsed config.json; without its `quantization_config` where the family reads that.
        shards: tensor -> its file.

    Raises:
        UserError: the folder is quantised in another way, or a part of a weight is missing, of another
            shape or dtype, or of no weight.
    """
    found = _expert_weights(shards)
    quantised = config.get(FIELD)
    if quantised is None:
        return found
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    if quantised.get("quant_method") == "compressed-tensors":
        return found | _compressed_weights(_compressed_form(quantised), shards)
    _check_blocks(quantised)
    return found | _block_weights(shards)


def _expert_weights(shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    found = {}
    for name in [n.removesuffix(BLOCKS) for n in shards if n.endswith(BLOCKS)]:
        if name + SCALES not in shards:
            raise UserError(f"{shards[name + BLOCKS].path}: {name}{BLOCKS} stands without {name}{SCALES}; "
                            "copy or download the folder again")
        if name in shards:
            raise UserError(f"{shards[name].path}: holds {name}, which {name}{BLOCKS} holds as well; remove "
                            "one of them")
        found[name] = LowBitWeight(name, MXFP4_EXPERTS,
                                   {suffix: shards[name + suffix] for suffix in (BLOCKS, SCALES)})
        _check_experts(found[name])
    return found


def _check_experts(weight: LowBitWeight) -> None:
    entries = [file.entries[weight.name + suffix] for suffix, file in weight.held.items()]
    blocks, scales = (list(entry.shape) for entry in entries)
    if (len(blocks) != 4 or blocks[-1] != PER_BLOCK // 2 or scales != blocks[:-1]
            or {entry.dtype for entry in entries} != {"U8"}):
        raise UserError(f"{weight.held[BLOCKS].path}: {weight.name}{BLOCKS} is {entries[0].dtype} {blocks} "
                        f"and {weight.name}{SCALES} {entries[1].dtype} {scales}, and MXFP4 is U8 [experts, "
                        f"outputs, inputs / {PER_BLOCK}, {PER_BLOCK // 2}] and U8 [experts, outputs, "
                        f"inputs / {PER_BLOCK}]; copy or download the folder again")


KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that make no other weights of the same bytes."""
NAMES = ("modules_to_not_convert", "ignored_layers")
"""Fields that name modules: the tensors' dtypes say the same."""


def _check_blocks(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` where weights are quantised otherwise."""
    # absent is what `None` is, but for the two that say what there is
    said = {name: quantised.get(name) for name in {*KNOWN, *quantised} if name not in NAMES}
    for name, value in sorted(said.items()):
        if value not in KNOWN.get(name, (None,)):
            raise UserError(f"{FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) "
                            f"with a scale for each block of {BLOCK} x {BLOCK} and those of "
                            "compressed-tensors are read; save the model without quantisation")


def _block_weights(shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    found = [name for name, file in shards.items() if file.entries[name].dtype == EIGHT_BITS]
    scales = {name + SUFFIX for name in found}
    if orphans := [name for name in shards if name.endswith(SUFFIX) and name not in scales]:
        raise UserError(f"{orphans[0]} is the scale of no tensor in {EIGHT_BITS}; download the folder again")
    for name in found:
        _check_scales(shards, name)
    return {name: LowBitWeight(name, FP8_BLOCK, {"": shards[name], SUFFIX: shards[name + SUFFIX]})
            for name in found}


def _check_scales(shards: Mapping[str, TensorFile], name: str) -> None:
    """Raise `UserError` where a weight is no matrix of bytes, or its scales are not those of its blocks."""
    entry, scale = shards[name].entries[name], name + SUFFIX
    if len(entry.shape) != 2 or math.prod(entry.shape) != entry.size_bytes:
        raise UserError(f"{name} has {entry.size_bytes} bytes and the shape {list(entry.shape)}; in "
                        f"{EIGHT_BITS} it must be a matrix with a byte for each number")
    if scale not in shards:
        raise UserError(f"{name} has no scale ({scale}); download the folder again")
    found, wanted = shards[scale].entries[scale], [-(-n // BLOCK) for n in entry.shape]
    if list(found.shape) != wanted or found.dtype != "F32":
        raise UserError(f"{scale} is {found.dtype} {list(found.shape)} and must be F32 {wanted}: a number "
                        f"for each block of {BLOCK} x {BLOCK} of {name}")


_DECIDE = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder")
"""Fields of a group's weights that decide what its bytes stand for."""


def _compressed_form(quantised: Mapping[str, Any]) -> LowBitFormat:
    """Return the format of a folder of compressed-tensors; `UserError` where it is none of ours."""
    groups = quantised.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    for form in (FP8_TENSOR, MXFP4, NVFP4):
        ours = form.field["config_groups"]["group_0"]["weights"]
        if (found and quantised.get("format") == form.field["format"]
                and not any(quantised.get(name) for name in ("transform_config", "sparsity_config"))
                and all(isinstance(group, dict) and isinstance(group.get("weights"), dict)
                        and all(group["weights"].get(name) == ours.get(name) for name in _DECIDE)
                        for group in found)):
            return form
    raise UserError(f"{FIELD} has format = {quantised.get('format')!r} with config_groups = {groups!r}, but "
                    "of compressed-tensors only float-quantized with a scale for each tensor, "
                    "mxfp4-pack-quantized and nvfp4-pack-quantized are read; save the model without "
                    "quantisation")


def _compressed_weights(form: LowBitFormat, shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    first = next(iter(form.sizes((form.group, form.group))))
    ends = f".weight{SCALE}"
    names = [name.removesuffix(SCALE) for name in shards if name.endswith(ends)]
    if orphans := [name for name, file in shards.items() if name.removesuffix(first) not in names
                   and (name.endswith(first) if first else file.entries[name].dtype == EIGHT_BITS)]:
        raise UserError(f"{orphans[0]} has no scale ({orphans[0].removesuffix(first)}{SCALE}); download the "
                        "folder again")
    return {name: _compressed_weight(form, name, shards) for name in names}


def _compressed_weight(form: LowBitFormat, name: str, shards: Mapping[str, TensorFile]) -> LowBitWeight:
    suffixes = list(form.sizes((form.group, form.group)))
    if missing := [name + suffix for suffix in suffixes if name + suffix not in shards]:
        raise UserError(f"{missing[0]} is missing beside {name}{SCALE}; download the folder again")
    weight = LowBitWeight(name, form, {suffix: shards[name + suffix] for suffix in suffixes})
    entries = {suffix: file.entries[name + suffix] for suffix, file in weight.held.items()}
    shape = weight.shape if len(entries[suffixes[0]].shape) == 2 else (0, 0)
    for suffix, (wanted, dtype) in form.sizes(shape).items():
        found = entries[suffix]
        if (found.shape != wanted or found.dtype != SAFETENSORS_DTYPES[dtype]
                or found.size_bytes != math.prod(wanted) * dtype.itemsize):
            raise UserError(f"{name}{suffix} is {found.dtype} {list(found.shape)} and must be "
                            f"{SAFETENSORS_DTYPES[dtype]} {list(wanted)} in {form.name}")
    return weight


# Writing: which weights of a model become which parts.

LINEAR = re.compile(r"\.layers\.\d+\..*\.((q|k|v|o|gate|up|down|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|w[123])"
                    r"\.weight$")
"""Weights that are written in few bits: the linear layers of attention and feed-forward networks, experts
and prediction layers included, as DeepSeek-V3, Qwen3 and their likes are released in FP8. Embeddings, output
head, routers, norms, biases and what joins a prediction layer's inputs keep their dtype."""
EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")
"""The same of gpt-oss, which is released with its experts alone in MXFP4."""
_JOINED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up", "w1": "up",
           "w3": "up", "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a"}
"""Weights that engines join into one, which has one scale."""


class ReadableModel(Protocol):
    """What rounding asks of a model's weights."""

    path: Path
    model: ModelConfig
    links: list[Link]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""


class LowBitModel:
    """A model's weights as a format stores them, made one at a time."""

    def __init__(self, source: ReadableModel, name: str, own: bool) -> None:
        """Choose the weights.

        Args:
            source: the model.
            name: the format's.
            own: whether the model's family reads `quantization_config` itself, as gpt-oss's does.

        Raises:
            UserError: the model has no weight that the format can hold, or its family no such format.
        """
        if own and name != MXFP4_EXPERTS.name:
            raise UserError(f"--quantize {name}: folders of family '{source.model.family}' are read in "
                            f"{MXFP4_EXPERTS.name} alone; use that")
        self.form, pattern = (MXFP4_EXPERTS, EXPERTS) if own else (FORMATS[name], LINEAR)
        self._source = source
        shapes = {n: shape for link in source.links for n, shape in link.hf_shapes().items()}
        self.names = {n for n, shape in shapes.items()
                      if pattern.search(n) and not shape[1] % self.form.group}
        """Of the weights that it stores in few bits."""
        if not self.names or (not own and any(EXPERTS.search(n) for n in shapes)):
            raise UserError(f"--quantize {name}: {source.path} has no linear layers that it can hold "
                            f"(matrices whose inputs {self.form.group} divides, and no stacks of experts); "
                            f"choose another format ({', '.join(FORMATS)})")
        self._kept = [n.removesuffix(".weight") for n, shape in shapes.items()
                      if len(shape) == 2 and n.endswith(".weight") and n not in self.names]
        self._joined: dict[str, list[str]] = {}
        for n in shapes:
            if n in self.names:
                self._joined.setdefault(_joined(n), []).append(n)
        self._largest: dict[str, float] = {}
        self._of_thread = threading.local()

    def field(self) -> dict[str, Any]:
        """Return `quantization_config`."""
        return self.form.field | {self.form.kept: self._kept}

    def specs(self, spec: TensorSpec) -> list[TensorSpec]:
        """Return what is written of a tensor: itself where it is kept."""
        if spec.name not in self.names:
            return [spec]
        return [TensorSpec(spec.name + suffix, *size) for suffix, size in self.form.sizes(spec.shape).items()]

    def stored(self, name: str) -> Stored:
        """Return what is stored of a weight.

        Raises:
            UserError: it holds NaN or infinity.
        """
        last: tuple[str, Stored] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] != name:  # its other parts are mostly written next
            largest = self._largest_of(name) if self.form.shares else 0.0
            last = self._of_thread.last = name, self.form.pack(self._float32(name), largest)
        return last[1]

    def rounded(self, name: str) -> torch.Tensor:
        """Return a weight as it is read from what is stored of it."""
        return self.form.unpack(self.stored(name))

    def _float32(self, name: str) -> torch.Tensor:
        return convert_tensor(self._source.read(name), torch.float32, self._source.path, name)

    def _largest_of(self, name: str) -> float:
        """Return the largest number of all weights that share a scale with one."""
        key = _joined(name)
        if key not in self._largest:
            self._largest[key] = max(float(self._float32(n).abs().max()) for n in self._joined[key])
        return self._largest[key]


def _joined(name: str) -> str:
    module, weight, end = name.rsplit(".", 2)
    return f"{module}.{_JOINED.get(weight, weight)}.{end}"
