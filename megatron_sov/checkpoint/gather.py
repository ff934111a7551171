"""Whole tensors of a model that is spread over processes, one at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.parallel.device import local_device
from megatron_sov.engine.parallel.values import gather_objects


@dataclass(frozen=True)
class _GatherPlace:
    """Where a block lies in its global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


class Gatherer:
    """Gathers tensors that the processes of a world hold in blocks; every call is made by
    all of them together."""

    def __init__(self, blocks: Sequence[LocalShard], *, everywhere: bool = False) -> None:
        """Exchange who owns what; the blocks may change their numbers afterwards, not their memory.

        Args:
            blocks: this process's, as `local_shards` gives them.
            everywhere: every process receives each tensor; else rank 0 alone.
        """
        self._rank, self._everywhere = dist.get_rank(), everywhere
        self._mine: dict[str, list[LocalShard]] = {}
        for block in blocks:
            # of blocks that several processes hold alike one speaks, or an element would come twice
            if block.owned:
                self._mine.setdefault(block.key, []).append(block)
        places = [_GatherPlace(b.key, b.global_shape, b.offset, b.shape, b.data.dtype)
                  for own in self._mine.values() for b in own]
        self._places: dict[str, dict[int, list[_GatherPlace]]] = {}
        for owner, found in enumerate(gather_objects(places)):
            for place in found:
                self._places.setdefault(place.key, {}).setdefault(owner, []).append(place)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: next(iter(owners.values()))[0].global_shape for key, owners in self._places.items()}

    @torch.no_grad()
    def gather(self, key: str) -> torch.Tensor | None:
        """Return a whole tensor in memory of its own, on the model's device;
        None on processes that do not receive.

        A process sends its blocks of the tensor in one message: memory holds the tensor and one
        process's share of it.
        """
        receives = self._everywhere or self._rank == 0
        owners = self._places[key]
        first = next(iter(owners.values()))[0]
        whole = (torch.empty(first.global_shape, dtype=first.dtype, device=local_device())
                 if receives else None)
        # all processes go through owners in the same order: sends and receives pair up without tags
        for owner, places in owners.items():
            share = self._pass_on(key, owner, places)
            if whole is None or share is None:
                continue
            start = 0
            for place in places:
                part = whole[place.slices]
                part.copy_(share[start:start + part.numel()].view(part.shape))
                start += part.numel()
        return whole

    def _pass_on(self, key: str, owner: int, places: list[_GatherPlace]) -> torch.Tensor | None:
        """Send one owner's share of a tensor to whoever receives; returns it there, flat."""
        share: torch.Tensor | None = None
        if self._rank == owner:
            share = torch.cat([block.data.detach().flatten() for block in self._mine[key]])
        elif self._everywhere or self._rank == 0:
            num_elements = sum(torch.Size(place.shape).numel() for place in places)
            share = torch.empty(num_elements, dtype=places[0].dtype, device=local_device())
        if self._everywhere:
            assert share is not None, "every process sends or receives"
            dist.broadcast(share, src=owner)
        elif owner != 0 and share is not None:
            if self._rank == owner:
                dist.send(share, dst=0)
            else:
                dist.recv(share, src=owner)
        return share


def in_order(gatherer: Gatherer, keys: Sequence[str]) -> Generator[tuple[str, torch.Tensor | None]]:
    """Yield each tensor with its name; a caller that stops early still lets the other processes finish."""
    left = iter(keys)
    try:
        for key in left:
            yield key, gatherer.gather(key)
    except GeneratorExit:
        # the others are inside the same loop and wait for this process's share of every tensor that is left
        for key in left:
            gatherer.gather(key)
        raise
