"""Replaying routes: the choice of experts of a step's tokens is looked up in one table of the step.

What reaches a router of a micro-batch's tokens, at any layout, under pipelines and when a layer is computed
again, is the library's padding mask, and nothing else.  So each token's place in the table travels in it: one
row of the mask says what is padding, as ever, and the rows behind it hold the bits of the place, since the
library turns its mask into bool.  No router keeps count of where it is, as the library's own `RouterReplay`
does, which an interleaved pipeline or a recomputation out of order would lead astray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megatron_sov.engine.mcore.parallel.device import local_device, to_device

WIDE_MARK = -1
"""65535 as int16, which torch can index and uint16 it cannot."""


@dataclass(frozen=True)
class Recorded:
    """What the table says of a process's tokens in one layer."""

    experts: torch.Tensor
    """[tokens, top_k] int64; any number where there is none."""
    there: torch.Tensor
    """[tokens] bool: whether the choice was recorded."""


class RouteTable:
    """The routes of all tokens of this process's micro-batches of a step, one after the other."""

    def __init__(self, routes: np.ndarray, first_layer: int) -> None:
        """Send routes to the device.

        Args:
            routes: [tokens, layers, top_k] uint8 or uint16, see `documents.routes`.
            first_layer: the library's number, from 1, of the first layer that has experts.
        """
        self._first_layer = first_layer
        self._mark = np.iinfo(np.uint8).max if routes.dtype == np.uint8 else WIDE_MARK
        held = routes if routes.dtype == np.uint8 else routes.view(np.int16)
        self._experts = to_device(torch.from_numpy(np.ascontiguousarray(held)), local_device())
        self._num_bits = max(1, (len(routes) - 1).bit_length())

    def mask(self, padding: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return a padding mask that holds places.

        Args:
            padding: [tokens] bool, True where a token is padding.
            places: [tokens] int64, each token's place in the table; padding's is never looked up.

        Returns:
            [1 + bits, tokens] bool.
        """
        bits = torch.arange(self._num_bits, device=places.device)[:, None]
        return torch.cat([padding[None], (places >> bits) & 1 == 1])

    def find(self, mask: torch.Tensor, layer: int) -> Recorded:
        """Return what is recorded of tokens by their part of a mask, [tokens, 1 + bits] bool."""
        bits = torch.arange(self._num_bits, device=mask.device)
        places = (mask[:, 1:].long() << bits).sum(dim=1)
        experts = self._experts[places, layer - self._first_layer]
        return Recorded(experts.long(), (experts[:, 0] != self._mark) & ~mask[:, 0])


@contextlib.contextmanager
def replayed(config: Any, rows: Sequence[np.ndarray | None]) -> Iterator[list[int | None]]:
    """Have a model's routers choose as was recorded, within.

    Args:
        config: the library's, which holds the `RoutingStep`.
        rows: routes of each row that the model will read; None: routers choose for it.

    Yields:
        The place of each row's first token in the table; None where it has no routes.
    """
    known = [row for row in rows if row is not None]
    firsts = iter(accumulate((len(row) for row in known), initial=0))
    step = config.routing_step
    if known:
        step.table = RouteTable(np.concatenate(known), 1 + config.moe_layer_freq.index(1))
    try:
        yield [None if row is None else next(firsts) for row in rows]
    finally:
        step.table = None
