"""A process group whose other ranks are mirror images of this one.

One process plays a rank of hundreds: what the others would send is what this one sends.  An exchange
of tokens brings as many as it took, a sum of gradients is the own part times the size of the group, a
gathered weight keeps the values it had.  So a rank of a model that no single machine holds can be built,
run and timed at its own sizes; time on the wires is what is missing.

Groups are torch's `fake` ones, which talk to nobody; the functions below are put in the place of torch's own
and fill the outputs.  Nothing else happens: torch's fake gather would copy a part of a buffer over all other
parts.  Call `install` before megatron-core is imported: it binds some of them while it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

MOST = {"rows": 0}
"""Rows of the largest exchange so far.  It can be far more than an even share: of all experts this rank has a
few, and what it sends to itself comes from all others, too."""


def install(rank: int, num_ranks: int) -> None:
    """Make this process rank `rank` of `num_ranks`, the others being its mirror images."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    for names, fill in (
            (("all_reduce",), _all_reduce),
            (("all_gather_into_tensor", "_all_gather_base"), _all_gather),
            (("reduce_scatter_tensor", "_reduce_scatter_base"), _reduce_scatter),
            (("all_to_all_single",), _all_to_all)):
        for name in names:
            setattr(dist, name, _filling(fill))
    dist.__dict__["_coalescing_manager"] = _together


class _Filled:
    """Stands for a message that has come."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextlib.contextmanager
def _together(*args: Any, **kwargs: Any) -> Iterator[_Filled]:
    """Stand for torch's context of messages that go at once."""
    yield _Filled()


def _filling(fill: Callable[..., None]) -> Callable[..., _Filled | None]:
    """Return a collective that does no more than to fill its output."""
    signature = inspect.signature(fill)

    @functools.wraps(fill)
    def call(*args: Any, **kwargs: Any) -> _Filled | None:
        with torch.no_grad():
            fill(*args, **kwargs)
        return _Filled() if signature.bind(*args, **kwargs).arguments.get("async_op") else None

    return call


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None,
                async_op: bool = False) -> None:
    if op == dist.ReduceOp.SUM:
        tensor.mul_(dist.get_world_size(group))


def _all_gather(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None,
                async_op: bool = False) -> None:
    if output_tensor.untyped_storage().data_ptr() == input_tensor.untyped_storage().data_ptr():
        return  # a part of a buffer: the other parts are nobody's mirror image, and stay
    output_tensor.view(-1, *input_tensor.shape).copy_(input_tensor)


def _reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM,
                    group: Any = None, async_op: bool = False) -> None:
    own = input.view(-1, *output.shape)[dist.get_rank(group)]
    if own.data_ptr() != output.data_ptr():
        output.copy_(own)
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
    mine = parts[rank]
    MOST["rows"] = max(MOST["rows"], len(output))
    if not len(mine):
        output.zero_()
        return
    # not `repeat`, which would copy the received data; NCCL does not
    whole = len(output) // len(mine)
    output[:whole * len(mine)].view(whole, *mine.shape).copy_(mine)
    output[whole * len(mine):].copy_(mine[:len(output) - whole * len(mine)])
