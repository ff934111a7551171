"""Replay of recorded expert routes, which generation recorded for each token."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megatron_sov.engine.parallel.device import get_local_device, to_device

UINT16_MARK = -1
"""65535 as int16: torch can index int16 tensors but not uint16."""


@contextlib.contextmanager
def replay_routes(config: Any, rows: Sequence[np.ndarray | None]) -> Iterator[list[int | None]]:
    """Replay recorded routes (`RouteTable`) inside the context.

    Args:
        config: Megatron-Core's config, with `routing_step`.
        rows: routes of each row of the step. None: routers choose.

    Yields:
        Table index of each row's first token; None for rows without routes.
    """
    recorded = [row for row in rows if row is not None]
    firsts = iter(accumulate((len(row) for row in recorded), initial=0))
    step = config.routing_step
    if recorded:
        step.table = RouteTable(np.concatenate(recorded), 1 + config.moe_layer_freq.index(1))
    try:
        yield [None if row is None else next(firsts) for row in rows]
    finally:
        step.table = None


class RouteTable:
    """Routes for the tokens in the step's local micro-batches, concatenated: routers look up the experts of
    each token in one table per step.

    The only tensor that reaches a router for the tokens of a micro-batch at any layout, under pipelines and
    in recomputation is Megatron-Core's padding mask. The mask therefore carries each token's index in the
    table: its first row is the padding, the further rows are the bits of the index, since Megatron-Core casts
    the mask to bool. A counter per router, as in Megatron-Core's `RouterReplay`, would fail with interleaved
    pipelines or out-of-order recomputation."""

    def __init__(self, routes: np.ndarray, first_layer: int) -> None:
        """Copy the routes to the device.

        Args:
            routes: [tokens, layers, top_k] uint8 or uint16, see `documents.shard_files`.
            first_layer: Megatron-Core's number (from 1) of the first MoE layer.
        """
        self._first_layer = first_layer
        self._mark = np.iinfo(np.uint8).max if routes.dtype == np.uint8 else UINT16_MARK
        indexable = routes if routes.dtype == np.uint8 else routes.view(np.int16)
        self._experts = to_device(torch.from_numpy(np.ascontiguousarray(indexable)), get_local_device())
        self._num_bits = max(1, (len(routes) - 1).bit_length())

    def encode_mask(self, padding: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Encode table indices into a padding mask.

        Args:
            padding: [tokens] bool, True where a token is padding.
            places: [tokens] int64 table index of each token; arbitrary for padding.

        Returns:
            [1 + bits, tokens] bool.
        """
        bits = torch.arange(self._num_bits, device=places.device)[:, None]
        return torch.cat([padding[None], (places >> bits) & 1 == 1])

    def decode_routes(self, mask: torch.Tensor, layer: int) -> "LayerRoutes":
        """Decode the indices from a mask [tokens, 1 + bits] bool and return the tokens' records."""
        bits = torch.arange(self._num_bits, device=mask.device)
        # padding has arbitrary indices and is masked below
        places = (mask[:, 1:].long() << bits).sum(dim=1)
        experts = self._experts[places, layer - self._first_layer]
        return LayerRoutes(experts.long(), (experts[:, 0] != self._mark) & ~mask[:, 0])


@dataclass(frozen=True)
class LayerRoutes:
    """Recorded routes for local tokens in a layer."""

    experts: torch.Tensor
    """[tokens, top_k] int64; arbitrary values for tokens without a record."""
    is_recorded: torch.Tensor
    """[tokens] bool: whether the table has a record for the token."""
