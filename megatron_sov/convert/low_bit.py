"""Read weights, matrices [outputs, inputs], that a Hugging Face folder stores in FP8 as bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.writer import SAFETENSORS_DTYPES, TensorFile

FIELD = "quantization_config"
EIGHT_BITS = "F8_E4M3"
"""The dtype's name in safetensors' headers."""
Stored = dict[str, torch.Tensor]
"""What is stored of a weight: suffix of its name -> tensor."""
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Suffix -> shape and dtype."""


@dataclass(frozen=True)
class LowBitFormat:
    """One way to store a weight in fewer bits."""

    name: str
    """For messages."""
    sizes: Callable[[tuple[int, ...]], Sizes]
    """Return what is stored of a weight of that shape."""
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]
    """Return the weight's shape from those of what is stored."""
    unpack: Callable[[Stored], torch.Tensor]
    """Return the weight in bfloat16."""


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


# FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 is released: the number that each block is
# multiplied with (its `inference/fp8_cast_bf16.py`). The product is rounded to bfloat16, as it is there.

BLOCK = 128
"""Rows and columns of a weight with one scale."""
SUFFIX = "_scale_inv"


def _block_sizes(shape: tuple[int, ...]) -> Sizes:
    return {"": (shape, torch.float8_e4m3fn),
            SUFFIX: (tuple(-(-n // BLOCK) for n in shape), torch.float32)}


def _unpack_blocks(stored: Stored) -> torch.Tensor:
    numbers, found = stored[""], torch.empty(stored[""].shape, dtype=torch.bfloat16)
    for row, scales in enumerate(stored[SUFFIX]):
        strip = slice(row * BLOCK, (row + 1) * BLOCK)
        found[strip] = numbers[strip].float() * scales.repeat_interleave(BLOCK)[:numbers.shape[1]]
    return found


FP8_BLOCK = LowBitFormat("fp8-block", _block_sizes, lambda shapes: shapes[""], _unpack_blocks)


# FP8 with one scale for a weight, as the library compressed-tensors writes it (`float-quantized`).

SCALE = "_scale"
FP8_TENSOR = LowBitFormat(
    "fp8-tensor", lambda shape: {"": (shape, torch.float8_e4m3fn), SCALE: ((1,), torch.float32)},
    lambda shapes: shapes[""], lambda stored: (stored[""].float() * stored[SCALE]).bfloat16())


# Reading: the weights of a folder that stand in few bits, found and checked from headers alone.


def low_bit_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    """Return the weights of a folder that stand in few bits, by name.

    Args:
        config: the parsed config.json.
        shards: tensor -> its file.

    Raises:
        UserError: the folder is quantised in another way, or a part of a weight is missing, of another
            shape or dtype, or of no weight.
    """
    quantised = config.get(FIELD)
    if quantised is None:
        return {}
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    if quantised.get("quant_method") == "compressed-tensors":
        _check_compressed(quantised)
        return _compressed_weights(shards)
    _check_blocks(quantised)
    return _block_weights(shards)


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


TENSOR_WIDE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None,
               "block_structure": None, "actorder": None}
"""Fields of a group of compressed-tensors that decide what the bytes of its weights stand for -> the values
that `FP8_TENSOR` reads."""


def _check_compressed(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` where a folder of compressed-tensors has weights in another format."""
    groups = quantised.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    is_read = (found and quantised.get("format") == "float-quantized"
               and not any(quantised.get(name) for name in ("transform_config", "sparsity_config"))
               and all(isinstance(group, dict) and isinstance(group.get("weights"), dict)
                       and all(group["weights"].get(name) == value for name, value in TENSOR_WIDE.items())
                       for group in found))
    if not is_read:
        raise UserError(f"{FIELD} has format = {quantised.get('format')!r} with config_groups = {groups!r}, "
                        "but of compressed-tensors only float-quantized with a scale for each tensor is "
                        "read; save the model without quantisation")


def _compressed_weights(shards: Mapping[str, TensorFile]) -> dict[str, LowBitWeight]:
    names = [name.removesuffix(SCALE) for name in shards if name.endswith(f".weight{SCALE}")]
    if orphans := [name for name, file in shards.items()
                   if name not in names and file.entries[name].dtype == EIGHT_BITS]:
        raise UserError(f"{orphans[0]} has no scale ({orphans[0]}{SCALE}); download the folder again")
    return {name: _compressed_weight(name, shards) for name in names}


def _compressed_weight(name: str, shards: Mapping[str, TensorFile]) -> LowBitWeight:
    if name not in shards:
        raise UserError(f"{name} is missing beside {name}{SCALE}; download the folder again")
    weight = LowBitWeight(name, FP8_TENSOR, {suffix: shards[name + suffix] for suffix in ("", SCALE)})
    entries = {suffix: file.entries[name + suffix] for suffix, file in weight.held.items()}
    shape = weight.shape if len(entries[""].shape) == 2 else (0, 0)
    for suffix, (wanted, dtype) in FP8_TENSOR.sizes(shape).items():
        found = entries[suffix]
        if (found.shape != wanted or found.dtype != SAFETENSORS_DTYPES[dtype]
                or found.size_bytes != math.prod(wanted) * dtype.itemsize):
            raise UserError(f"{name}{suffix} is {found.dtype} {list(found.shape)} and must be "
                            f"{SAFETENSORS_DTYPES[dtype]} {list(wanted)} in {FP8_TENSOR.name}")
    return weight
