"""Pad each group with rows of zeros to a row count that quantized products support."""

from __future__ import annotations

import torch

from ...common.recipe import CustomRecipe, MXFP8BlockScaling, NVFP4BlockScaling, Recipe
from ..quantization import FP8GlobalStateManager


def get_row_alignment(recipe: Recipe) -> int:
    """Return the number that row counts must be multiples of."""
    if isinstance(recipe, CustomRecipe):
        return recipe.quantization_alignment
    if isinstance(recipe, MXFP8BlockScaling):
        return 32
    return 128 if isinstance(recipe, NVFP4BlockScaling) else 16


class _Aligned(torch.nn.Module):
    """Alignment of both modules; `align_size` None: by the recipe of the first forward pass."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def _padded(self, m_splits: list[int]) -> list[int]:
        """Return the numbers of rows with padding; the first call fixes the alignment."""
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        if self.align_size is None:
            self.align_size = get_row_alignment(FP8GlobalStateManager.get_fp8_recipe())
        return [-(-rows // self.align_size) * self.align_size for rows in m_splits]


class Fp8Padding(_Aligned):
    """Pads each group of rows with zeros."""

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Return [padded rows, columns] and the groups' padded numbers of rows."""
        padded = self._padded(m_splits)
        parts = [torch.nn.functional.pad(part, (0, 0, 0, full - len(part)))
                 for part, full in zip(inp.split(m_splits), padded, strict=True)]
        return torch.cat(parts), padded


class Fp8Unpadding(_Aligned):
    """Removes the padding of `Fp8Padding`."""

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        """Return [rows, columns]; `m_splits` are the numbers of rows without padding."""
        parts = inp.split(self._padded(m_splits))
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
