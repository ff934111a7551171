"""Logits of the output head kept within a cap by ``cap * tanh(x / cap)`` (arXiv 2408.00118, section 2)."""

from __future__ import annotations

import torch


def cap_(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return capped logits, in their place; None: as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def slope(logits: torch.Tensor, cap: float | None, temperature: float,
          token_rows: int) -> torch.Tensor | None:
    """Return the derivative of capped logits by what they were before, ``1 - (capped / cap)^2``; None: no
    cap.

    Args:
        logits: [C, V / tp], capped, then divided by the temperature.
        cap: the cap.
        temperature: see `logits`.
        token_rows: columns that belong to token ids; those behind have no derivative.
    """
    if cap is None:
        return None
    found = (logits * (temperature / cap)).square_().neg_().add_(1)
    found[:, token_rows:] = 0
    return found
