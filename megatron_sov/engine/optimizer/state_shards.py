"""What one process updates of each parameter, all of it or (ZeRO-1) a range,
and its state as blocks of global tensors.

The library's distributed optimizer lays all parameters end to end, whatever their shapes, and gives every
data-parallel process an equal stretch of that: of a parameter it then updates the elements [start, stop) of
the flattened tensor.  Cut out of a block, such a range is a few rectangles, so the state has the same names
and shapes at every layout, with ZeRO-1 and without.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, ParameterLookup, declared_blocks
from megatron_sov.engine.optimizer.adamw import HostAdamW, wait

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(first index, extent)."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


# Ranges of the elements of a flattened tensor, as rectangles of the tensor.


def flat_ranges(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut the elements [start, stop) of a row-major tensor into at most 2 * axes - 1 rectangles.

    They come in the order of the elements: the end of a row, whole rows, the beginning of a row,
    and so on inwards.
    """
    if stop <= start:
        return
    row = math.prod(shape[1:])
    # `head` elements of row `first` lie before the range, `tail` elements of row `last` inside of it
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    # the range begins and ends inside one row: that row is cut on its own, one axis less
    if head and first == last:
        yield from _in_row(shape, first, head, tail)
        return
    if head:
        yield from _in_row(shape, first, head, row)
        first += 1
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    if tail:
        yield from _in_row(shape, last, 0, tail)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Rectangle]:
    for place, extent in flat_ranges(shape[1:], start, stop):
        yield (index, *place), (1, *extent)


class Inner(Protocol):
    """What updates shards: torch's AdamW, a fused one, or Muon."""

    param_groups: list[dict[str, Any]]
    """Shards with their settings."""
    state: Any
    """Shard -> name -> tensor."""

    def step(self) -> Any:
        """Update all shards by their gradients."""


@dataclass(frozen=True)
class StateShard:
    """The elements [start, start + main.numel()) of a flattened parameter, which this process updates."""

    parameter: torch.nn.Parameter
    """The model's parameter."""
    start: int
    """First element."""
    main: torch.Tensor
    """What torch's optimizer updates: the parameter's own memory,
    or under bf16 fp32 master weights; contiguous."""
    inner: Inner
    """What updates `main` and holds its state."""
    exclusive: bool
    """Whether the other data-parallel processes update other elements (ZeRO-1), not the same."""

    @property
    def stop(self) -> int:
        return self.start + self.main.numel()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the moments or Muon's momentum and, under bf16, the master weights: each [elements],
        views of live memory."""
        state, names = self.inner.state[self.main], getattr(self.inner, "state_names", MOMENTS)
        if not state and hasattr(self.inner, "initialize_state"):  # Transformer Engine's, in its own dtypes
            self.inner.initialize_state(self.main, False)
        elif not state:  # before the first update: what that would begin with
            if _counts_per_parameter(self.inner):
                state["step"] = torch.tensor(0.0)
            for name in names:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
        named = {name: state[name] for name in names}
        if self.main.dtype != self.parameter.dtype:
            named[MASTER] = self.main
        return {name: tensor.detach().view(-1) for name, tensor in named.items()}


def shards(optimizer: Any) -> list[StateShard]:
    """Return what this process updates, parameter by parameter; parameters of which it updates
    nothing are left out.

    Args:
        optimizer: one of the library's (routed experts have one of their own), as the library makes it.
    """
    if optimizer.optimizer is None:
        return []
    return list(_ranges(optimizer) if isinstance(optimizer, DistributedOptimizer) else _wholes(optimizer))


def _ranges(optimizer: DistributedOptimizer) -> Iterator[StateShard]:
    """Yield the ranges of parameters that lie in this process's stretch of the library's buffers."""
    for models, mains in ((optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
                          (optimizer.model_fp32_groups, optimizer.shard_fp32_groups)):
        for model_group, main_group in zip(models, mains, strict=True):
            for parameter, main in zip(model_group, main_group, strict=True):
                start = optimizer._get_model_param_range_map(parameter)["param"].start
                yield StateShard(parameter, start, main, optimizer.optimizer, exclusive=True)


def _wholes(optimizer: Any) -> Iterator[StateShard]:
    """Yield whole parameters, from an optimizer that does the same update on every data-parallel process."""
    model_of = {}
    low_groups, high_groups = (getattr(optimizer, "float16_groups", []),
                               getattr(optimizer, "fp32_from_float16_groups", []))
    for low, high in zip(low_groups, high_groups, strict=True):
        model_of.update({id(main): model for model, main in zip(low, high, strict=True)})
    for group in optimizer.optimizer.param_groups:
        for main in group["params"]:
            yield StateShard(model_of.get(id(main), main), 0, main, optimizer.optimizer, exclusive=False)


def take_gradients(shards: Iterable[StateShard]) -> None:
    """Give every shard its part of the summed gradients, which torch's optimizer then updates it with.

    The library's own way makes float32 of them first; so does this one where they were summed in bf16.
    """
    to_host = False
    for shard in shards:
        gradient: torch.Tensor = (
            shard.parameter.main_grad.view(-1)[shard.start:shard.stop])  # type: ignore[attr-defined]
        if isinstance(shard.inner, HostAdamW):
            shard.inner.receive(shard.main, gradient.view(shard.main.shape))
            to_host = True
        else:
            shard.main.grad = gradient.view(shard.main.shape).to(shard.main.dtype)
    if to_host:
        wait()


class _AnyFloat:
    """See `any_float`."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._named: Any = None

    def __enter__(self) -> None:
        # simulated processes take turns in here: the first changes the names, the last restores them
        if self._num_inside == 0:
            self._named = named = torch.Tensor.type

            def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                found = named(tensor, *args, **kwargs)
                return found.replace("DoubleTensor", "FloatTensor") if isinstance(found, str) else found

            torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
        self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        self._num_inside -= 1
        if self._num_inside == 0:
            torch.Tensor.type = self._named  # type: ignore[method-assign]


any_float = _AnyFloat()
"""`with any_float:` the library makes its distributed optimizer for float64 too: it knows three dtypes, by
the names of their types."""


def shard_blocks(model: LanguageModel, shards: Iterable[StateShard]) -> Iterator[tuple[LocalShard,
                                                                                       StateShard]]:
    """Yield the model's blocks that this process updates, with the shard that holds (a part of) each."""
    of_parameter = {id(shard.parameter): shard for shard in shards}
    lookup = ParameterLookup(model)
    for block in declared_blocks(model):
        shard = of_parameter.get(id(lookup.find(block)))
        if shard is not None:
            yield block, shard


def state_shards(model: LanguageModel, shards: Iterable[StateShard]) -> Iterator[LocalShard]:
    """Yield the state of this process's shards, named `exp_avg/KEY`, `exp_avg_sq/KEY`,
    `momentum/KEY` and `master/KEY`."""
    for block, shard in shard_blocks(model, shards):
        for name, flat in shard.state().items():
            for piece in pieces(block, shard, flat):
                yield dataclasses.replace(piece, key=f"{name}/{block.key}")


def pieces(block: LocalShard, shard: StateShard, flat: torch.Tensor) -> Iterator[LocalShard]:
    """Yield `flat` [elements of the shard], as far as it belongs to `block` of the parameter, in blocks of
    the global tensor."""
    if not block.data.is_contiguous():
        raise ValueError(f"{block.key}: its block is not a contiguous part of the parameter, "
                         "so its state cannot be cut alike")
    # several blocks may share a parameter's memory (experts, query and key): places are counted in it
    first = int(block.data.storage_offset()) - int(shard.parameter.storage_offset())
    start, stop = max(shard.start, first), min(shard.stop, first + block.data.numel())
    leading = len(block.global_shape) - block.data.dim()
    # under ZeRO-1 nobody else updates these elements, so whoever has them writes them; else replica 0 does
    replica = (*block.replica[:-1], 0) if shard.exclusive else block.replica
    for place, extent in flat_ranges(block.data.shape, start - first, stop - first):
        count = math.prod(extent)
        inner = (o + p for o, p in zip(block.offset[leading:], place, strict=True))
        begin = start - shard.start
        yield LocalShard(block.key, flat[begin:begin + count].view(extent), block.global_shape,
                    (*block.offset[:leading], *inner), replica)
        start += count


def set_updates(shards: Iterable[StateShard], num_updates: int) -> None:
    """Set the number of updates that the state has seen, which AdamW's bias correction counts.

    Each parameter gets a counter of its own: the library's own loading gives all of them one tensor, which
    torch's AdamW then counts up once per parameter.
    """
    for shard in shards:
        if _counts_per_parameter(shard.inner):
            shard.state()
            shard.inner.state[shard.main]["step"] = torch.tensor(float(num_updates))
        else:
            for group in shard.inner.param_groups:
                group["step"] = num_updates


def _counts_per_parameter(inner: Inner) -> bool:
    """Torch's Adam counts updates in every parameter's state, fused ones (Transformer Engine,
    Apex) in their groups."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
