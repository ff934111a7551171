"""Reads weights that stand in a folder as MXFP4: blocks of 32 numbers of 4 bits that share a scale (OCP
Microscaling Formats v1.0, sections 5.2 and 5.3).

A weight NAME [experts, inputs, outputs] is stored as NAME_blocks [experts, outputs, inputs / 32, 16] uint8,
two numbers (E2M1) in a byte, the lower half first, and NAME_scales [experts, outputs, inputs / 32] uint8,
powers of two with an offset of 127 (E8M0).  Numbers come out in bfloat16, which has all of them but those
below its range; transformers makes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile

BLOCKS, SCALES = "_blocks", "_scales"
PER_BLOCK = 32
"""Numbers that share a scale."""
OFFSET, NOT_A_NUMBER = 127, 255
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Number of each 4 bits."""
BLOCKS_AT_A_TIME = 1 << 13
"""Blocks that are unpacked at a time: what fits a core's cache."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as blocks and scales."""

    name: str
    blocks: TensorFile
    """The file that holds its blocks."""
    scales: TensorFile
    """The file that holds its scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [experts, inputs, outputs]."""
        experts, outputs, groups, _ = self.blocks.entries[self.name + BLOCKS].shape
        return experts, groups * PER_BLOCK, outputs

    @property
    def dtype(self) -> torch.dtype:
        """Return that of what is read."""
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        """Return the names of the files that hold a part of it."""
        return {self.blocks.path.name, self.scales.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of blocks and scales."""
        return self.name + BLOCKS, self.name + SCALES

    def read(self) -> torch.Tensor:
        """Return the weight, bfloat16.

        Raises:
            UserError: a file is damaged, or a scale is no number.
        """
        blocks, scales = self.blocks.read(self.name + BLOCKS), self.scales.read(self.name + SCALES)
        if bool((scales == NOT_A_NUMBER).any()):
            raise UserError(f"{self.scales.path}: {self.name}{SCALES} holds {NOT_A_NUMBER}, which is no "
                            "number in E8M0; take weights from before the model broke")
        return unpacked(blocks, scales).transpose(1, 2)


def packed_weights(shards: dict[str, TensorFile]) -> dict[str, PackedWeight]:
    """Return the weights of a folder that are stored as blocks and scales, by name.

    Args:
        shards: tensor -> the file that holds it.

    Raises:
        UserError: blocks stand without scales or beside the weight itself, or have another shape or dtype.
    """
    found = {}
    for name in [n.removesuffix(BLOCKS) for n in shards if n.endswith(BLOCKS)]:
        if name + SCALES not in shards:
            raise UserError(f"{shards[name + BLOCKS].path}: {name}{BLOCKS} stands without {name}{SCALES}; "
                            "copy or download the folder again")
        if name in shards:
            raise UserError(f"{shards[name].path}: holds {name}, which {name}{BLOCKS} holds as well; remove "
                            "one of them")
        found[name] = PackedWeight(name, shards[name + BLOCKS], shards[name + SCALES])
        _check(found[name])
    return found


def _check(weight: PackedWeight) -> None:
    entries = (weight.blocks.entries[weight.name + BLOCKS], weight.scales.entries[weight.name + SCALES])
    blocks, scales = (list(entry.shape) for entry in entries)
    if (len(blocks) != 4 or blocks[-1] != PER_BLOCK // 2 or scales != blocks[:-1]
            or {entry.dtype for entry in entries} != {"U8"}):
        raise UserError(f"{weight.blocks.path}: {weight.name}{BLOCKS} is {entries[0].dtype} {blocks} and "
                        f"{weight.name}{SCALES} {entries[1].dtype} {scales}, and MXFP4 is U8 [experts, "
                        f"outputs, inputs / {PER_BLOCK}, {PER_BLOCK // 2}] and U8 [experts, outputs, "
                        f"inputs / {PER_BLOCK}]; copy or download the folder again")


@cache
def _pairs() -> torch.Tensor:
    """Return for each byte its two numbers in bfloat16, side by side as one integer: [256] int32."""
    numbers, byte = torch.tensor(E2M1, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1).view(torch.int32).flatten()


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
