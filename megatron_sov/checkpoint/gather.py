"""Gather a distributed model's weights, a whole tensor at a time."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.engine.parallel.values import gather_objects


class TensorGatherer:
    """Gathers global tensors from every process's blocks. Every method is collective.

    Args:
        blocks: local shards of this process. Their values may change later, their memory may not.
        everywhere: every process receives each tensor; otherwise rank 0 only.
    """

    def __init__(self, blocks: Sequence[LocalShard], *, everywhere: bool = False) -> None:
        self._rank, self._everywhere = dist.get_rank(), everywhere
        self._local_shards: dict[str, list[LocalShard]] = {}
        for block in blocks:
            # skip replicas: each element must arrive exactly once
            if block.owned:
                self._local_shards.setdefault(block.key, []).append(block)
        positions = [_BlockPosition(b.key, b.global_shape, b.offset, b.shape, b.data.dtype)
                     for shards in self._local_shards.values() for b in shards]
        self._positions: dict[str, dict[int, list[_BlockPosition]]] = {}
        for owner, rank_positions in enumerate(gather_objects(positions)):
            for position in rank_positions:
                self._positions.setdefault(position.key, {}).setdefault(owner, []).append(position)

    def get_shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: next(iter(owners.values()))[0].global_shape for key, owners in self._positions.items()}

    @torch.no_grad()
    def gather(self, key: str) -> torch.Tensor | None:
        """Gather tensor `key` into new memory on the model's device; None on ranks that do not receive the
        tensor.

        Each owner sends its blocks in one message, so peak memory is the tensor plus the largest share.
        """
        receives = self._everywhere or self._rank == 0
        owners = self._positions[key]
        first = next(iter(owners.values()))[0]
        tensor = (torch.empty(first.global_shape, dtype=first.dtype, device=get_local_device())
                  if receives else None)
        # every process visits the owners in the same order, so sends and receives pair up without tags
        for owner, positions in owners.items():
            share = self._send_share(key, owner, positions)
            if tensor is None or share is None:
                continue
            start = 0
            for position in positions:
                block = tensor[position.slices]
                block.copy_(share[start:start + block.numel()].view(block.shape))
                start += block.numel()
        return tensor

    def _send_share(self, key: str, owner: int, positions: "list[_BlockPosition]") -> torch.Tensor | None:
        """Send the blocks of `owner` to the receiving ranks.

        Returns the flat blocks on `owner` and the receiving ranks, else None.
        """
        share: torch.Tensor | None = None
        if self._rank == owner:
            share = torch.cat([block.data.detach().flatten() for block in self._local_shards[key]])
        elif self._everywhere or self._rank == 0:
            num_elements = sum(torch.Size(position.shape).numel() for position in positions)
            share = torch.empty(num_elements, dtype=positions[0].dtype, device=get_local_device())
        if self._everywhere:
            assert share is not None, "every process sends or receives"
            dist.broadcast(share, src=owner)
        elif owner != 0 and share is not None:
            if self._rank == owner:
                dist.send(share, dst=0)
            else:
                dist.recv(share, src=owner)
        return share


@dataclass(frozen=True)
class _BlockPosition:
    """Position of a `LocalShard` in the global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


def iter_gathered(gatherer: TensorGatherer,
                  keys: Sequence[str]) -> Generator[tuple[str, torch.Tensor | None]]:
    """Yield (key, tensor). If the caller stops early, the remaining tensors are still gathered."""
    remaining = iter(keys)
    try:
        for key in remaining:
            yield key, gatherer.gather(key)
    except GeneratorExit:
        # other processes are in the same loop and wait for this process's remaining blocks
        for key in remaining:
            gatherer.gather(key)
        raise
