"""Read weights [outputs, inputs] that a Hugging Face folder stores in FP8, as bfloat16.

A weight has a scale per block of 128 x 128 (DeepSeek-V3), or a single scale (format `float-quantized` of
compressed-tensors). It is value times scale, rounded as in DeepSeek-V3's `inference/fp8_cast_bf16.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.safetensors_files import TensorFile

FIELD = "quantization_config"
EIGHT_BITS = "F8_E4M3"
"""Name for `torch.float8_e4m3fn` in safetensors headers."""
BLOCK = 128
"""Rows and columns per block."""
BLOCK_SCALES, SINGLE_SCALE = "_scale_inv", "_scale"
"""Suffixes of the names of scales."""
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
class LowBitWeight:
    """A weight stored in FP8."""

    parts: tuple[str, str]
    """Names of the stored weight and its scales."""
    shards: Mapping[str, TensorFile]
    """Tensor name -> file."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shards[self.parts[0]].entries[self.parts[0]].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        return {self.shards[part].path.name for part in self.parts}

    def read(self) -> torch.Tensor:
        """Read the weight in bfloat16; raises `UserError` if a file is damaged."""
        numbers, scales = (self.shards[part].read(part, dtype=dtype) for part, dtype in zip(
            self.parts, (torch.float8_e4m3fn, torch.float32), strict=True))
        if scales.dim() == 1:
            return (numbers.float() * scales).bfloat16()
        weight = torch.empty(numbers.shape, dtype=torch.bfloat16)
        for row, row_scales in enumerate(scales):
            strip = slice(row * BLOCK, (row + 1) * BLOCK)
            weight[strip] = numbers[strip].float() * row_scales.repeat_interleave(BLOCK)[:numbers.shape[1]]
        return weight


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
    suffix = BLOCK_SCALES
    if quantised.get("quant_method") == "compressed-tensors":
        _check_compressed(quantised)
        suffix = SINGLE_SCALE
    else:
        _check_blocks(quantised)
    names = {name.removesuffix(suffix) for name, file in shards.items()
             if file.entries[name].dtype == EIGHT_BITS or name.endswith(f".weight{suffix}")}
    return {name: _open_weight(name, suffix, shards) for name in names}


def _open_weight(name: str, suffix: str, shards: Mapping[str, TensorFile]) -> LowBitWeight:
    """Check a weight's header and that of its scales."""
    scales = name + suffix
    if name not in shards:
        raise UserError(f"{name} is missing, although {scales} exists; download the folder again")
    if scales not in shards:
        raise UserError(f"{name} has no scale ({scales}); download the folder again")
    shape = shards[name].entries[name].shape
    if len(shape) != 2:
        raise UserError(f"{name} has shape {list(shape)}, but an FP8 weight is a matrix; download the folder "
                        "again")
    num_scales = (1,) if suffix == SINGLE_SCALE else tuple(-(-n // BLOCK) for n in shape)
    for part, kind, expected, itemsize in ((name, EIGHT_BITS, shape, 1), (scales, "F32", num_scales, 4)):
        stored, size_bytes = shards[part].entries[part], math.prod(expected) * itemsize
        if (stored.dtype, stored.shape, stored.size_bytes) != (kind, expected, size_bytes):
            raise UserError(f"{part} is {stored.dtype} {list(stored.shape)} and must be {kind} "
                            f"{list(expected)}, see {FIELD}")
    return LowBitWeight((name, scales), shards)


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


def _check_compressed(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a compressed-tensors folder has a single scale per weight."""
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
