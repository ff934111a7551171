"""Weights of a Hugging Face folder in 8 bits, with a scale for each block of 128 x 128: as DeepSeek-V3 is
released.

Such a weight stands there as float8_e4m3fn, and beside it, as `<name>_scale_inv`, the number that each of its
blocks is multiplied with (DeepSeek-V3's `inference/fp8_cast_bf16.py`).  The product is rounded to bfloat16,
as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
RESULT = torch.bfloat16
KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that make no other weights of the same bytes."""
NAMES = ("modules_to_not_convert", "ignored_layers")
"""Fields that name modules: the tensors' dtypes say the same."""


class BlockScales:
    """The scales of a folder's tensors, and where they stand."""

    def __init__(self, where: object, config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> None:
        """Find and check them, from headers alone.

        Args:
            where: the folder, for messages.
            config: the parsed config.json.
            shards: tensor -> its file.

        Raises:
            UserError: the folder is quantised in another way, or a scale is missing, of another shape, or
                of no tensor.
        """
        quantised = config.get(FIELD)
        if quantised is not None:
            _check_kind(where, quantised)
        eight_bits = {name for name, file in shards.items() if file.entries[name].dtype == EIGHT_BITS}
        self._scales = {name + SUFFIX: name for name in eight_bits} if quantised is not None else {}
        orphans = [name for name in shards if name.endswith(SUFFIX) and name not in self._scales]
        if orphans and quantised is not None:
            raise UserError(f"{where}: {orphans[0]} is the scale of no tensor in {EIGHT_BITS}; download the "
                            "folder again")
        self._shards = shards
        for scale, name in self._scales.items():
            self._check(where, name, scale)

    def _check(self, where: object, name: str, scale: str) -> None:
        entry = self._shards[name].entries[name]
        if len(entry.shape) != 2 or math.prod(entry.shape) != entry.size_bytes:
            raise UserError(f"{where}: {name} has {entry.size_bytes} bytes and the shape "
                            f"{list(entry.shape)}; in {EIGHT_BITS} it must be a matrix with a byte for each "
                            "number")
        if scale not in self._shards:
            raise UserError(f"{where}: {name} has no scale ({scale}); download the folder again")
        found, wanted = self._shards[scale].entries[scale], [-(-n // BLOCK) for n in entry.shape]
        if list(found.shape) != wanted or found.dtype != "F32":
            raise UserError(f"{where}: {scale} is {found.dtype} {list(found.shape)} and must be F32 "
                            f"{wanted}: a number for each block of {BLOCK} x {BLOCK} of {name}")

    def without(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return a table of tensors without the scales."""
        return {name: shape for name, shape in shapes.items() if name not in self._scales}

    def scaled(self, name: str) -> bool:
        """Return whether a tensor has scales."""
        return name + SUFFIX in self._scales

    def files_of(self, name: str) -> set[str]:
        """Return the file of a tensor's scales, where it has some."""
        return {self._shards[name + SUFFIX].path.name} if self.scaled(name) else set()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that has scales, in `RESULT`; `UserError` where its file is damaged."""
        stored = self._shards[name].read(name, dtype=torch.float8_e4m3fn)
        scales = self._shards[name + SUFFIX].read(name + SUFFIX)
        found = torch.empty(stored.shape, dtype=RESULT)
        for row, of_row in enumerate(scales):
            rows = slice(row * BLOCK, (row + 1) * BLOCK)
            found[rows] = stored[rows].float() * of_row.repeat_interleave(BLOCK)[:stored.shape[1]]
        return found


def _check_kind(where: object, quantised: Any) -> None:
    """Raise `UserError` where weights are quantised otherwise."""
    if not isinstance(quantised, dict):
        raise UserError(f"{where}: {FIELD} = {quantised!r} must be an object; download config.json again")
    # absent is what `None` is, but for the two that say what there is
    said = {name: quantised.get(name) for name in {*KNOWN, *quantised} if name not in NAMES}
    for name, value in sorted(said.items()):
        if value not in KNOWN.get(name, (None,)):
            raise UserError(f"{where}: {FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) "
                            f"with a scale for each block of {BLOCK} x {BLOCK} are read; save the model "
                            "without quantisation")
