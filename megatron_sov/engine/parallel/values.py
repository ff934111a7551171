"""Small values between processes: numbers by their names, and plain Python values.

Nothing here imports megatron: processes talk before it may be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

# Several numbers in one message, each by its name: what a flat tensor says by position only.
#
# A message costs the same for one number as for ten, so what is summed at the same moment travels
# together.

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape, in the order in which values lie in a flat tensor."""


def pack(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return tensors of one dtype as one flat tensor, in the mapping's order."""
    return torch.cat([value.reshape(-1) for value in values.values()])


def unpack(flat: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return what `pack` joined, by name; the tensors share memory with `flat`.

    Raises:
        ValueError: it has another number of elements than the shapes.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if sum(sizes) != flat.numel():
        raise ValueError(f"{flat.numel()} numbers are not {dict(shapes)}")
    parts = flat.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def sum_dict(values: Mapping[str, float], over: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Sum numbers over processes, each by its name; called by all of them together.

    Args:
        values: this process's; the same names in the same order on every process.
        over: sums a float64 tensor over the processes that are meant, such as `all_reduce_world`.
    """
    total = over(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, total.tolist(), strict=True))


# Plain Python values between processes: for what is small and rare, where a tensor would only hide
# what is meant.

def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every process's value, by rank, on every process; called by all processes of the group
    (None: all) together."""
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process; called by all processes together."""
    if dist.get_world_size() == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]
