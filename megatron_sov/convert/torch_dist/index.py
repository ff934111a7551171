"""The index of a `torch_dist` checkpoint (`.metadata`, a pickled `torch.distributed.checkpoint.Metadata`):
which tensors there are, and in which bytes of which file each part of them stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from megatron_sov.convert.torch_dist import allowed
from megatron_sov.convert.torch_dist.inert import Made, Name, fields, read, text_keys

MAX_AXES = 8
MAX_SIZE = 1 << 48
"""Of an axis, an offset or a file."""
OF_TRAINING = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
"""Beginnings of the keys of what only goes on with a run."""
Index = dict[str, Any]
"""As JSON: `tensors`: key -> [dtype, shape, pieces], a piece being [file, first byte, bytes, offset, shape];
`num_skipped`: tensors of the optimizer; `num_objects`: entries that are no tensors."""


def read_index(raw: bytes) -> Index:
    """Return what the index says of the model's tensors.

    Raises:
        ValueError: it holds anything but tensors' metadata, or places that cannot be.
    """
    try:
        metadata = fields(read(raw, allowed.in_index), allowed.METADATA, allowed.MCORE_METADATA)
        entries = text_keys(metadata["state_dict_metadata"])
        stored = _stored(metadata["storage_data"])
        tensors: dict[str, Any] = {}
        num_objects = num_skipped = 0
        for key, value in entries.items():
            if isinstance(value, Made) and value.name == allowed.BYTES:
                num_objects += 1
            elif key.startswith(OF_TRAINING):
                num_skipped += 1
            else:
                tensors[key] = _tensor(key, value, stored)
    except KeyError as e:
        raise ValueError(f"it lacks {str(e)[:200]}") from None
    return {"tensors": tensors, "num_objects": num_objects, "num_skipped": num_skipped}


def _stored(value: Any) -> dict[tuple[str, tuple[int, ...]], list[Any]]:
    """Return where each part of each tensor stands: [file, first byte, bytes]."""
    if not isinstance(value, list):
        raise ValueError("it does not say where tensors are stored")
    found = {}
    for place, info in value:
        where = fields(place, allowed.PLACE)
        if not isinstance(where["fqn"], str):
            raise ValueError("a stored part belongs to no name")
        if where.get("offset") is None:  # an object, or a tensor that is no part
            continue
        at = (where["fqn"], _sizes(where["offset"]))
        stored = fields(info, allowed.STORED)
        if stored.get("transform_descriptors"):
            raise ValueError(f"{where['fqn'][:200]}: is stored compressed, or transformed in another way, "
                             "which is not read")
        if at in found:
            raise ValueError(f"{where['fqn'][:200]}: a part of it is stored twice")
        found[at] = [_file(stored["relative_path"]), _number(stored["offset"]), _number(stored["length"])]
    return found


def _tensor(key: str, value: Any, stored: dict[tuple[str, tuple[int, ...]], list[Any]]) -> list[Any]:
    tensor = fields(value, allowed.TENSOR)
    shape, chunks = _sizes(tensor["size"]), tensor["chunks"]
    dtype = _dtype(tensor["properties"])
    if type(chunks) is not list or not chunks:
        raise ValueError(f"{key[:200]}: does not say what parts it has")
    pieces = []
    for chunk in chunks:
        part = fields(chunk, allowed.CHUNK)
        offset, extent = _sizes(part["offsets"]), _sizes(part["sizes"])
        if not len(shape) == len(offset) == len(extent) or any(
                o + n > whole for o, n, whole in zip(offset, extent, shape, strict=True)):
            raise ValueError(f"{key[:200]}: a part of {list(extent)} at {list(offset)} does not lie in a "
                             f"tensor of {list(shape)}")
        # taken out: a list of parts that is named again and again shall not fill the memory
        file, start, length = stored.pop((key, offset), ("", 0, 0))
        if not file:
            raise ValueError(f"{key[:200]}: the part at {list(offset)} is stored nowhere")
        if math.prod(extent) > length:
            raise ValueError(f"{key[:200]}: the part of {list(extent)} at {list(offset)} would stand in "
                             f"{length} bytes")
        pieces.append([file, start, length, offset, extent])
    return [dtype, shape, pieces]


def _dtype(value: Any) -> str:
    """Return the name of a tensor's dtype; its properties are written as a tuple that it comes first in."""
    if not (isinstance(value, Made) and value.name == allowed.PROPERTIES):
        raise ValueError("a tensor has no properties")
    found = value.state[0] if isinstance(value.state, tuple) and value.state else None
    if not (isinstance(found, Name) and found.module == "torch" and found.name in allowed.DTYPE_NAMES):
        raise ValueError("a tensor has no dtype")
    return found.name


def _sizes(value: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    if not (isinstance(value, Made) and value.name == allowed.SIZE and len(value.arguments) == 1
            and isinstance(value.arguments[0], (tuple, list))):
        raise ValueError("a torch.Size is needed where something else stands")
    sizes = tuple(value.arguments[0])
    if len(sizes) > MAX_AXES:
        raise ValueError(f"a tensor would have {len(sizes)} axes, at most {MAX_AXES} are read")
    return tuple(_numbers(sizes))


def _numbers(values: Iterable[Any]) -> Iterator[int]:
    return map(_number, values)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ValueError("a size or place is no number, negative, or beyond any file")
    return value


def _file(value: Any) -> str:
    """Return a path below the checkpoint's folder."""
    parts = PurePosixPath(value).parts if isinstance(value, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in value:
        raise ValueError(f"a tensor would stand in {str(value)[:200]!r}, which is not a file below the "
                         "checkpoint's folder")
    return str(value)
