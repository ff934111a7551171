"""Weights of a Hugging Face folder in 8 bits, with a scale for each block of 128 x 128: as DeepSeek-V3 is
released.

Such a weight stands there as float8_e4m3fn, and beside it, as `<name>_scale_inv`, the number that each of its
blocks is multiplied with (DeepSeek-V3's `inference/fp8_cast_bf16.py`).  The product is rounded to bfloat16,
as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile

FIELD = "quantization_config"
BLOCK = 128
"""Rows and columns of a weight with one scale."""
SUFFIX = "_scale_inv"
EIGHT_BITS = "F8_E4M3"
"""The dtype's name in safetensors' headers."""
KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that make no other weights of the same bytes."""
NAMES = ("modules_to_not_convert", "ignored_layers")
"""Fields that name modules: the tensors' dtypes say the same."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in 8 bits with a scale for each of its blocks."""

    name: str
    weight: TensorFile
    """The file that holds it."""
    scales: TensorFile
    """The file that holds its scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return self.weight.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Return that of its product with its scales."""
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        """Return the names of the files that hold a part of it."""
        return {self.weight.path.name, self.scales.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the weight and of its scales."""
        return self.name, self.name + SUFFIX

    def read(self) -> torch.Tensor:
        """Return the product, in bfloat16; `UserError` where a file is damaged."""
        stored = self.weight.read(self.name, dtype=torch.float8_e4m3fn)
        scales = self.scales.read(self.name + SUFFIX)
        found = torch.empty(stored.shape, dtype=self.dtype)
        for row, of_row in enumerate(scales):
            rows = slice(row * BLOCK, (row + 1) * BLOCK)
            found[rows] = stored[rows].float() * of_row.repeat_interleave(BLOCK)[:stored.shape[1]]
        return found


def scaled_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> dict[str, ScaledWeight]:
    """Return the weights of a folder that stand in 8 bits beside their scales, by name.

    They are found and checked from headers alone.

    Args:
        config: the parsed config.json.
        shards: tensor -> its file.

    Raises:
        UserError: the folder is quantised in another way, or a scale is missing, of another shape, or
            of no tensor.
    """
    quantised = config.get(FIELD)
    if quantised is None:
        return {}
    _check_kind(quantised)
    found = [name for name, file in shards.items() if file.entries[name].dtype == EIGHT_BITS]
    scales = {name + SUFFIX for name in found}
    if orphans := [name for name in shards if name.endswith(SUFFIX) and name not in scales]:
        raise UserError(f"{orphans[0]} is the scale of no tensor in {EIGHT_BITS}; download the folder again")
    for name in found:
        _check(shards, name)
    return {name: ScaledWeight(name, shards[name], shards[name + SUFFIX]) for name in found}


def _check(shards: Mapping[str, TensorFile], name: str) -> None:
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


def _check_kind(quantised: Any) -> None:
    """Raise `UserError` where weights are quantised otherwise."""
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    # absent is what `None` is, but for the two that say what there is
    said = {name: quantised.get(name) for name in {*KNOWN, *quantised} if name not in NAMES}
    for name, value in sorted(said.items()):
        if value not in KNOWN.get(name, (None,)):
            raise UserError(f"{FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) "
                            f"with a scale for each block of {BLOCK} x {BLOCK} are read; save the model "
                            "without quantisation")
