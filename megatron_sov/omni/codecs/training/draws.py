"""What is random in training, as a function of (seed, step), so that one that is continued draws the same."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """Return a generator on the CPU for one purpose at one step."""
    digest = hashlib.sha256(f"{seed}:{step}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_rows(num_rows: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Return the rows [batch_size] of a step, the first being step 1.

    Every row is met once before any is met again; the order of each round is another one.
    """
    begin = (step - 1) * batch_size
    places = torch.arange(begin, begin + batch_size)
    rows = torch.empty(batch_size, dtype=torch.int64)
    for epoch in (places // num_rows).unique().tolist():
        order = torch.randperm(num_rows, generator=generator(seed, epoch, "order"))
        here = places // num_rows == epoch
        rows[here] = order[places[here] % num_rows]
    return rows
