"""The quantiser of a picture's patches: SimVQ (https://arxiv.org/abs/2411.02038) over unit vectors, as TA-Tok
(https://arxiv.org/abs/2506.18898) has it.

Codes are a frozen table behind one linear layer that is learned, and all of them move with it, so that none
dies for want of use; codes and vectors are normalised, and the nearest code has the largest cosine.  The
quantiser itself is vector-quantize-pytorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import SimVQ

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
