"""How much of a codebook is used: what says everything with a few tokens has learned a small codebook."""

from __future__ import annotations

import math

import torch


class CodebookUsage:
    """Counts ids as they come.

    Args:
        codebook_size: ids are below it.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        """How often each id came."""

    def add(self, ids: torch.Tensor) -> None:
        """Count ids of any shape."""
        self.counts += torch.bincount(ids.detach().reshape(-1).cpu(), minlength=len(self.counts))

    def figures(self) -> dict[str, float]:
        """Return `perplexity` (e to the entropy of the ids: so many ids, equally frequent, would say as much)
        and `used_share` (of the codebook's entries that came at all; the others are dead)."""
        total = int(self.counts.sum())
        if not total:
            return {"perplexity": math.nan, "used_share": 0.0}
        shares = self.counts[self.counts > 0].double() / total
        return {"perplexity": float(torch.exp(-(shares * shares.log()).sum())),
                "used_share": float((self.counts > 0).double().mean())}
