"""Messages with named numbers and plain Python values between processes.

This module does not import megatron: processes communicate before megatron may be loaded."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape, in flat tensor order."""


def flatten_tensors(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors with equal dtype to a flat tensor, in mapping order."""
    return torch.cat([value.reshape(-1) for value in values.values()])


def unflatten_tensors(flat: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Split a flat tensor by name; inverse of `flatten_tensors`. The results share memory with `flat`. Raises
    `ValueError`: the number of elements differs from the shapes'."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    if sum(sizes) != flat.numel():
        raise ValueError(f"{flat.numel()} numbers are not {dict(shapes)}")
    parts = flat.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def sum_dict(values: Mapping[str, float], over: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Sum named numbers over processes in one message. Collective.

    Args:
        values: local numbers; names and order must be equal on all processes.
        over: sums a float64 tensor over processes, for example `all_reduce_world`.
    """
    total = over(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, total.tolist(), strict=True))


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every process's value, by rank. Collective over `group` (None: all processes)."""
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process. Collective."""
    if dist.get_world_size() == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message, src=0)
    return message[0]
