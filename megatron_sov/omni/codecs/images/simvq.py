"""A tokenizer of pictures in TA-Tok's shape, small enough to be trained: a vision transformer, a layer into
the codebook's space, SimVQ, and a plain transformer back to pixels, which training needs and use does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from vector_quantize_pytorch import SimVQ

from megatron_sov.base.settings import ProblemCode, SettingsProblem, multiple_of
from megatron_sov.omni.codecs.images.siglip import SiglipFeatures, SiglipSettings

# The quantiser of a picture's patches: SimVQ (https://arxiv.org/abs/2411.02038) over unit vectors, as TA-
# Tok
# (https://arxiv.org/abs/2506.18898) has it.
#
# Codes are a frozen table behind one linear layer that is learned, and all of them move with it, so that
# none
# dies for want of use; codes and vectors are normalised, and the nearest code has the largest cosine.  The
# quantiser itself is vector-quantize-pytorch's.

_SCORES = 1 << 26
"""Numbers of a table of vectors by codes that is made at a time."""


class UnitLength(nn.Module):
    """Vectors at length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors of the last axis, normalised."""
        return F.normalize(vectors, dim=-1)


class UnitSimVQ(nn.Module):
    """SimVQ over unit vectors.

    Args:
        width: of the vectors.
        codebook_size: codes.
        bias: whether the layer before the codes has one; TA-Tok's does.
    """

    def __init__(self, width: int, codebook_size: int, bias: bool = False) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.book = SimVQ(dim=width, codebook_size=codebook_size,
                          codebook_transform=nn.Sequential(nn.Linear(width, width, bias=bias), UnitLength()))
        """The library's: `frozen_codebook` [codes, width] and `code_transform`."""

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes [n, t, width], ids [n, t] and the commitment loss of [n, t, width] vectors; gradients
        pass the codes by the library's rotation."""
        codes, ids, loss = self.book(F.normalize(vectors, dim=-1))
        return codes, ids, loss

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of [n, t, width] vectors, in bounded memory."""
        codes, flat = self.book.codebook, F.normalize(vectors, dim=-1).flatten(0, 1)
        rows = max(1, _SCORES // self.codebook_size)
        ids = torch.cat([torch.cdist(part, codes).argmin(-1) for part in flat.split(rows)])
        return ids.view(vectors.shape[:2])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the codes [..., width] of ids."""
        codes: torch.Tensor = self.book.code_transform(F.embedding(ids, self.book.frozen_codebook))
        return codes


MAX_CODEBOOK_SIZE = 1 << 20


@dataclass(frozen=True)
class SimVQSettings:
    """Sizes of the networks."""

    side_pixels: Annotated[int, Ge(1), Le(4096)] = 384
    """Height and width of a picture; a whole number of patches."""
    grid: Annotated[int, Ge(1), Le(256)] = 24
    """Patches of a row and of a column: a picture has grid * grid tokens."""
    width: Annotated[int, Ge(1), Le(16384), multiple_of("num_heads")] = 384
    """Of the transformers."""
    num_layers: Annotated[int, Ge(1), Le(100)] = 6
    """Of the encoder, and of the decoder."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 6
    """Of attention; divides `width`."""
    code_width: Annotated[int, Ge(1), Le(16384)] = 64
    """Of the codebook's vectors."""
    codebook_size: Annotated[int, Ge(2), Le(MAX_CODEBOOK_SIZE)] = 65_536
    """Tokens there are."""
    siglip: SiglipSettings | None = None
    """A SigLIP, frozen, that sees in place of an encoder that is learned."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together."""
        found = []
        if self.siglip is not None and self.side_pixels // self.siglip.patch_pixels != self.grid:
            found.append(SettingsProblem(ProblemCode.RULE, "grid",
                                         "must be the number of siglip's patches of "
                                         f"{self.siglip.patch_pixels} pixels in side_pixels = "
                                         f"{self.side_pixels}",
                                         self.grid))
        if self.siglip is None and self.side_pixels % self.grid:
            found.append(SettingsProblem(ProblemCode.RULE, "side_pixels",
                                         f"must be a multiple of grid = {self.grid}", self.side_pixels))
        return found


class SimVQTokenizer(nn.Module):
    """Pictures as ids; an `interface.ImageTokenizer` with a decoder of its own."""

    Settings = SimVQSettings

    def __init__(self, settings: SimVQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.side_pixels, self.grid = settings.side_pixels, settings.grid
        self.codebook_size, self.width = settings.codebook_size, settings.code_width
        patch = settings.side_pixels // settings.grid
        tokens = settings.grid ** 2
        if settings.siglip is None:
            self.encoder: nn.Module = _PatchEncoder(settings)
            self.to_code = nn.Linear(settings.width, settings.code_width)
        else:
            self.encoder = SiglipFeatures(settings.siglip, settings.side_pixels).requires_grad_(False)
            self.to_code = nn.Linear(settings.siglip.width, settings.code_width)
        self.quantiser = self.make_quantiser()
        self.from_code = nn.Linear(settings.code_width, settings.width)
        self.drawn_at = nn.Parameter(torch.randn(tokens, settings.width) * 0.02)
        self.decoder = _transformer(settings)
        self.to_pixels = nn.Linear(settings.width, 3 * patch * patch)

    def make_quantiser(self) -> Any:
        """Return what finds codes; a baseline may put another one here."""
        return UnitSimVQ(self.settings.code_width, self.settings.codebook_size)

    def _vectors(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the vectors [n, tokens, code_width] before the codebook."""
        vectors: torch.Tensor = self.to_code(self.encoder(pictures))
        return vectors

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return reconstructions [n, 3, side, side], ids and the quantiser's loss, for training."""
        codes, ids, loss = self.quantiser(self._vectors(pictures))
        return self._draw(codes), ids, loss

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            ids: torch.Tensor = self.quantiser.nearest(self._vectors(pictures))
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid, width] float32 embeddings of ids."""
        with torch.no_grad():
            codes: torch.Tensor = self.quantiser.embed(ids)
        return codes

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the pictures [n, 3, side, side] in 0..1 that the plain decoder draws of ids."""
        with torch.no_grad():
            return self._draw(self.embed(ids)).clamp(0, 1)

    def _draw(self, codes: torch.Tensor) -> torch.Tensor:
        patches = self.to_pixels(self.decoder(self.from_code(codes) + self.drawn_at)).transpose(1, 2)
        patch = self.side_pixels // self.grid
        drawn = F.fold(patches, self.grid * patch, kernel_size=patch, stride=patch) + 0.5
        if self.grid * patch == self.side_pixels:
            return drawn
        return F.interpolate(drawn, size=self.side_pixels, mode="bilinear", align_corners=False)


class _PatchEncoder(nn.Module):
    """A small vision transformer."""

    def __init__(self, settings: SimVQSettings) -> None:
        super().__init__()
        patch = settings.side_pixels // settings.grid
        self.to_patches = nn.Conv2d(3, settings.width, patch, stride=patch)
        self.seen_at = nn.Parameter(torch.randn(settings.grid ** 2, settings.width) * 0.02)
        self.layers = _transformer(settings)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return states [n, patches, width] of pictures in 0..1."""
        patches = self.to_patches(pictures * 2 - 1).flatten(2).transpose(1, 2)
        states: torch.Tensor = self.layers(patches + self.seen_at)
        return states


def _transformer(settings: SimVQSettings) -> nn.Module:
    layers = (nn.TransformerEncoderLayer(settings.width, settings.num_heads, 4 * settings.width, dropout=0.0,
                                         activation="gelu", batch_first=True, norm_first=True)
              for _ in range(settings.num_layers))
    return nn.Sequential(*layers, nn.LayerNorm(settings.width))
