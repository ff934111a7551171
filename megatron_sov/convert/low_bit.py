"""Read weights [outputs, inputs] that a Hugging Face folder stores in FP8, as bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.safetensors_files import SAFETENSORS_DTYPES, TensorFile

FIELD = "quantization_config"
EIGHT_BITS = "F8_E4M3"
"""Name for `torch.float8_e4m3fn` in safetensors headers."""
Stored = dict[str, torch.Tensor]
"""Name suffix -> stored tensor, for a weight."""
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Suffix -> shape and dtype."""
BLOCK = 128
"""Rows and columns per block."""
SUFFIX = "_scale_inv"
SCALE = "_scale"
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that do not change how stored bytes are interpreted."""
MODULE_FIELDS = ("modules_to_not_convert", "ignored_layers")
"""Fields that list unquantized modules; the dtypes in the files contain the same information."""
TENSOR_WISE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None,
               "block_structure": None, "actorder": None}
"""Field in a compressed-tensors group that determines how bytes are interpreted -> supported values."""


@dataclass(frozen=True)
class LowBitFormat:
    """Storage format for a weight."""

    name: str
    """Name for messages."""
    sizes: Callable[[tuple[int, ...]], Sizes]
    """Weight shape -> stored tensors' shapes and dtypes."""
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]
    """Stored tensors' shapes -> weight shape."""
    unpack: Callable[[Stored], torch.Tensor]
    """Stored tensors -> weight in bfloat16."""


@dataclass(frozen=True)
class LowBitWeight:
    """A weight stored in FP8."""

    name: str
    form: LowBitFormat
    shards: Mapping[str, TensorFile]
    """Suffix -> file with this stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape({suffix: file.entries[self.name + suffix].shape
                                for suffix, file in self.shards.items()})

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        return {file.path.name for file in self.shards.values()}

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name + suffix for suffix in self.shards)

    def read(self) -> torch.Tensor:
        """Read the weight in bfloat16; raises `UserError` if a file is damaged or a scale is not finite."""
        dtypes = {suffix: dtype for suffix, (_, dtype) in self.form.sizes(self.shape).items()}
        try:
            return self.form.unpack({suffix: file.read(self.name + suffix, dtype=dtypes[suffix])
                                     for suffix, file in self.shards.items()})
        except ValueError as e:
            file = next(iter(self.shards.values())).path
            raise UserError(f"{file}: {self.name}{e}; use an earlier checkpoint") from None


# FP8 with a scale per 128 x 128 block, DeepSeek-V3's format: value times scale, rounded to bfloat16
# (`inference/fp8_cast_bf16.py` in DeepSeek-V3).


def _block_sizes(shape: tuple[int, ...]) -> Sizes:
    return {"": (shape, torch.float8_e4m3fn), SUFFIX: (tuple(-(-n // BLOCK) for n in shape), torch.float32)}


def _unpack_blocks(stored: Stored) -> torch.Tensor:
    numbers, weight = stored[""], torch.empty(stored[""].shape, dtype=torch.bfloat16)
    for row, scales in enumerate(stored[SUFFIX]):
        strip = slice(row * BLOCK, (row + 1) * BLOCK)
        weight[strip] = numbers[strip].float() * scales.repeat_interleave(BLOCK)[:numbers.shape[1]]
    return weight


FP8_BLOCK = LowBitFormat("fp8-block", _block_sizes, lambda shapes: shapes[""], _unpack_blocks)


# FP8 with a scale per weight: format `float-quantized` in the compressed-tensors library.

FP8_TENSOR = LowBitFormat(
    "fp8-tensor", lambda shape: {"": (shape, torch.float8_e4m3fn), SCALE: ((1,), torch.float32)},
    lambda shapes: shapes[""], lambda stored: (stored[""].float() * stored[SCALE]).bfloat16())


# Low-bit weights of a folder, found and checked from headers.

def find_low_bit_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> dict[str,
                         LowBitWeight]:
    """Return name -> weight for a folder's FP8 weights; {} without `quantization_config`.

    Args:
        config: content of config.json.
        shards: tensor name -> file.

    Raises:
        UserError: the format is not supported, or a stored tensor is missing or has a wrong shape or dtype.
    """
    quantised = config.get(FIELD)
    if quantised is None:
        return {}
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    if quantised.get("quant_method") == "compressed-tensors":
        _check_compressed(quantised)
        return _find_compressed_weights(shards)
    _check_blocks(quantised)
    return _find_block_weights(shards)


def _check_blocks(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the format is FP8 with block scales."""
    # Absent fields count as None, except for `quant_method` and `weight_block_size`, which must be present.
    values = {name: quantised.get(name) for name in {*SUPPORTED_VALUES, *quantised}
              if name not in MODULE_FIELDS}
    for name, value in sorted(values.items()):
        if value not in SUPPORTED_VALUES.get(name, (None,)):
            raise UserError(f"{FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) with a scale "
                            f"per block of {BLOCK} x {BLOCK} and those of compressed-tensors are supported; "
                            "save the model without quantization")


def _find_block_weights(shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    names = [name for name, file in shards.items() if file.entries[name].dtype == EIGHT_BITS]
    scales = {name + SUFFIX for name in names}
    if orphans := [name for name in shards if name.endswith(SUFFIX) and name not in scales]:
        raise UserError(f"{orphans[0]} is a scale without a tensor in {EIGHT_BITS}; download the folder "
                        "again")
    for name in names:
        _check_scales(shards, name)
    return {name: LowBitWeight(name, FP8_BLOCK, {"": shards[name], SUFFIX: shards[name + SUFFIX]})
            for name in names}


def _check_scales(shards: Mapping[str, TensorFile], name: str) -> None:
    """Raise `UserError` unless the weight is a matrix with one byte per number and a scale per block."""
    entry, scale = shards[name].entries[name], name + SUFFIX
    if len(entry.shape) != 2 or math.prod(entry.shape) != entry.size_bytes:
        raise UserError(f"{name} has {entry.size_bytes} bytes and shape {list(entry.shape)}; in {EIGHT_BITS} "
                        "it must be a matrix with one byte per number")
    if scale not in shards:
        raise UserError(f"{name} has no scale ({scale}); download the folder again")
    stored, expected = shards[scale].entries[scale], [-(-n // BLOCK) for n in entry.shape]
    if list(stored.shape) != expected or stored.dtype != "F32":
        raise UserError(f"{scale} is {stored.dtype} {list(stored.shape)} and must be F32 {expected}: one "
                        f"number per block of {BLOCK} x {BLOCK} of {name}")


def _check_compressed(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a compressed-tensors folder has the format `FP8_TENSOR`."""
    groups = quantised.get("config_groups")
    group_list = list(groups.values()) if isinstance(groups, dict) else []
    is_supported = (group_list and quantised.get("format") == "float-quantized"
                    and not any(quantised.get(name) for name in ("transform_config", "sparsity_config"))
                    and all(isinstance(group, dict) and isinstance(group.get("weights"), dict)
                       and all(group["weights"].get(name) == value for name, value in TENSOR_WISE.items())
                            for group in group_list))
    if not is_supported:
        raise UserError(f"{FIELD} has format = {quantised.get('format')!r} with config_groups = {groups!r}, "
                        "but the only supported compressed-tensors format is float-quantized with one scale "
                        "per tensor; save the model without quantization")


def _find_compressed_weights(shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    names = [name.removesuffix(SCALE) for name in shards if name.endswith(f".weight{SCALE}")]
    if orphans := [name for name, file in shards.items()
                   if name not in names and file.entries[name].dtype == EIGHT_BITS]:
        raise UserError(f"{orphans[0]} has no scale ({orphans[0]}{SCALE}); download the folder again")
    return {name: _open_compressed_weight(name, shards) for name in names}


def _open_compressed_weight(name: str, shards: Mapping[str, TensorFile]) -> LowBitWeight:
    if name not in shards:
        raise UserError(f"{name} is missing, although {name}{SCALE} exists; download the folder again")
    weight = LowBitWeight(name, FP8_TENSOR, {suffix: shards[name + suffix] for suffix in ("", SCALE)})
    entries = {suffix: file.entries[name + suffix] for suffix, file in weight.shards.items()}
    shape = weight.shape if len(entries[""].shape) == 2 else (0, 0)
    for suffix, (expected, dtype) in FP8_TENSOR.sizes(shape).items():
        stored = entries[suffix]
        if (stored.shape != expected or stored.dtype != SAFETENSORS_DTYPES[dtype]
                or stored.size_bytes != math.prod(expected) * dtype.itemsize):
            raise UserError(f"{name}{suffix} is {stored.dtype} {list(stored.shape)} and must be "
                            f"{SAFETENSORS_DTYPES[dtype]} {list(expected)} in {FP8_TENSOR.name}")
    return weight
