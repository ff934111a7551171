"""Run one process as a rank of a large process group whose other ranks are its mirror images.

One process acts as one rank of hundreds, and the others are assumed to send the same data as this rank. A
token exchange returns as many tokens as it sends, a gradient sum is the local gradient times the group size,
and a gathered weight keeps its values. A rank of a model that no single machine can hold can thus be built,
run and timed at full size; only the communication time is missing.

The groups are torch's `fake` groups, which send nothing. The functions below replace torch's collectives and
fill the outputs. (Torch's own fake gather would copy a shard of a buffer over the other shards.) Call
`install` before the import of megatron-core, which binds some of the collectives at import.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

MOST = {"rows": 0}
"""Rows received in the largest all-to-all so far. It can far exceed an even share, because every mirror image
sends as many rows as this rank sends to itself."""


def install(rank: int, num_ranks: int) -> None:
    """Make this process rank `rank` of `num_ranks`; all others are its mirror images."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    for names, fill in (
            (("all_reduce",), _all_reduce),
            (("all_gather_into_tensor", "_all_gather_base"), _all_gather),
            (("reduce_scatter_tensor", "_reduce_scatter_base"), _reduce_scatter),
            (("all_to_all_single",), _all_to_all)):
        for name in names:
            setattr(dist, name, replace_collective(fill))
    dist.__dict__["_coalescing_manager"] = coalesce_completed


class CompletedWork:
    """The handle of a collective that has completed."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextlib.contextmanager
def coalesce_completed(*args: Any, **kwargs: Any) -> Iterator[CompletedWork]:
    """Replace torch's context manager of coalesced collectives."""
    yield CompletedWork()


def replace_collective(fill: Callable[..., None]) -> Callable[..., CompletedWork | None]:
    """Return a collective that only fills its output with `fill`."""
    signature = inspect.signature(fill)

    @functools.wraps(fill)
    def call(*args: Any, **kwargs: Any) -> CompletedWork | None:
        with torch.no_grad():
            fill(*args, **kwargs)
        return CompletedWork() if signature.bind(*args, **kwargs).arguments.get("async_op") else None

    return call


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None,
                async_op: bool = False) -> None:
    if op == dist.ReduceOp.SUM:
        tensor.mul_(dist.get_world_size(group))


def _all_gather(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None,
                async_op: bool = False) -> None:
    if output_tensor.untyped_storage().data_ptr() == input_tensor.untyped_storage().data_ptr():
        return  # a shard of the output buffer itself: the other shards keep their values
    output_tensor.view(-1, *input_tensor.shape).copy_(input_tensor)


def _reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM,
                    group: Any = None, async_op: bool = False) -> None:
    shard = input.view(-1, *output.shape)[dist.get_rank(group)]
    if shard.data_ptr() != output.data_ptr():
        output.copy_(shard)
    if op == dist.ReduceOp.SUM:
        output.mul_(dist.get_world_size(group))


def _all_to_all(output: torch.Tensor, input: torch.Tensor, output_split_sizes: list[int] | None = None,
                input_split_sizes: list[int] | None = None, group: Any = None,
                async_op: bool = False) -> None:
    """Fill the output with the data for this rank, repeated: each mirror image sends the same. If there are
    none, fill with zeros."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = (input.chunk(size) if input_split_sizes is None
             else input.split([int(n) for n in input_split_sizes]))
    local = parts[rank]
    MOST["rows"] = max(MOST["rows"], len(output))
    if not len(local):
        output.zero_()
        return
    # not `repeat`, which would copy the received data; NCCL does not
    repeats = len(output) // len(local)
    output[:repeats * len(local)].view(repeats, *local.shape).copy_(local)
    output[repeats * len(local):].copy_(local[:len(output) - repeats * len(local)])
