"""Read pickles in untrusted checkpoints as data, without imports or calls.

A pickle is a program. Python's interpreter here builds plain values only: `GLOBAL` pushes a `Name`, `REDUCE`
and `NEWOBJ` push an `InertCall` with the name and its arguments. Names that are not allowed, and opcodes that
writers of plain values do not emit, raise ValueError. No opcode copies a value, so a small pickle cannot fill
the memory, and `parse_file` limits the memory and CPU time for a file by its size.
"""

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_size
from megatron_sov.chat.limits import CpuTimeExceeded, limit_resources

MAX_NAME_CHARS = 80
"""Limit for a name in an error message."""


@dataclass(frozen=True)
class Name:
    """A module attribute that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:MAX_NAME_CHARS]


class Items:
    """Pairs from a dict, in order; keys from untrusted files are not hashed."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self._pairs.append((key, value))

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


class InertCall:
    """A call that the pickle would make."""

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None
        """Argument that the pickle would pass to `__setstate__`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of a mapping."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class InertObject:
    """A persistent id, for example the reference to a tensor's storage."""

    key: Any


def parse_pickle(raw: bytes, allowed: Callable[[Name], bool]) -> Any:
    """Parse a pickle; raises ValueError for truncation, a forbidden name or a forbidden opcode."""
    try:
        return _Machine(raw, allowed).load()
    except (EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
            struct.error, pickle.UnpicklingError) as e:
        raise ValueError(f"it is not a pickle of plain values ({type(e).__name__}: {e})") from None


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> None:
        raise ValueError(f"it has the opcode {chr(code)!r}, which pickles of plain values do not have")


_PLAIN_OPCODES = (
    "PROTO", "FRAME", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4",
    "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "BUILD", "BINPERSID", "MEMOIZE",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "STOP")
_CHANGED_OPCODES = {"EMPTY_SET": "EMPTY_LIST", "ADDITEMS": "APPENDS", "FROZENSET": "LIST"}
"""Opcode -> the opcode that it is executed as: nothing is hashed."""


class _Machine(pickle._Unpickler):
    """Python's own interpreter of pickles, in which names, calls and dicts stay data."""

    stack: list[Any]
    dispatch = _Opcodes()
    for _name, _executed in (*zip(_PLAIN_OPCODES, _PLAIN_OPCODES, strict=True), *_CHANGED_OPCODES.items()):
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _executed)[0]]
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Items())
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = lambda self: self.load_call()

    def __init__(self, raw: bytes, allowed: Callable[[Name], bool]) -> None:
        super().__init__(io.BytesIO(raw))
        self._allowed = allowed

    def load_call(self) -> None:
        """Push the call of a name with a tuple of arguments, which is not copied."""
        arguments, name = self.stack.pop(), self.stack[-1]
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise TypeError("a call needs a name and a tuple of arguments")
        self.stack[-1] = InertCall(name, arguments)

    def find_class(self, module: str, name: str) -> Name:
        """Return a `Name`; raises ValueError if it is not allowed."""
        global_name = Name(module, name)
        if not self._allowed(global_name):
            raise ValueError(f"it names {str(global_name)!r}, which is not allowed")
        return global_name

    def persistent_load(self, key: Any) -> InertObject:
        return InertObject(key)


def get_attributes(value: Any, *names: Name) -> dict[str, Any]:
    """Return an object's attributes if its class is one of `names`; raises ValueError otherwise."""
    if not (isinstance(value, InertCall) and value.name in names):
        raise ValueError(f"a {names[0].name} is needed instead of {_describe_type(value)}")
    return to_text_dict(value.state if value.state is not None else Items())


def to_text_dict(value: Any) -> dict[str, Any]:
    """Convert pairs with unique text keys to a dict; raises ValueError for other keys."""
    if not isinstance(value, Items) or not all(isinstance(key, str) for key, _ in value):
        raise ValueError(f"a dict with text keys is needed instead of {_describe_type(value)}")
    mapping = dict(value)
    if len(mapping) != len(value):
        raise ValueError("a dict has a key twice")
    return mapping


def _describe_type(value: Any) -> str:
    return str(value.name) if isinstance(value, InertCall) else f"a {type(value).__name__}"


# Names allowed in a checkpoint's pickles, never imported.

_META, _PLAN = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
METADATA = Name(_META, "Metadata")
MCORE_METADATA = Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
"""Metadata class up to megatron-core 0.15."""
TENSOR, BYTES = Name(_META, "TensorStorageMetadata"), Name(_META, "BytesStorageMetadata")
PROPERTIES, CHUNK = Name(_META, "TensorProperties"), Name(_META, "ChunkStorageMetadata")
PLACE = Name(_META, "MetadataIndex")
"""Key of a stored block: tensor name and offset."""
STORED = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
"""Location of a stored block: file, first byte and length."""
SIZE = Name("torch", "Size")
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8",
               "bool", "float8_e4m3fn", "float8_e5m2")
MEMBER = Name("builtins", "getattr")
"""Used by Python 3.11 for enumeration members."""
_INDEX = {
    METADATA, MCORE_METADATA, TENSOR, BYTES, PROPERTIES, CHUNK, PLACE, STORED, SIZE,
    Name(_META, "StorageMeta"), Name(_META, "_MEM_FORMAT_ENCODING"),
    Name("torch.serialization", "_get_layout"),
    # The processes' save plans, which Megatron caches for the next save.
    Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    *(Name(_PLAN, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
                                     "BytesIOWriteData")),
    *(Name(module, name) for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "PurePosixPath", "Path")),
    Name("collections", "OrderedDict"), MEMBER,
    *(Name("torch", name) for name in DTYPE_NAMES),
}
REBUILT, ORDERED = Name("torch._utils", "_rebuild_tensor_v2"), Name("collections", "OrderedDict")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
STORAGES = {Name("torch", f"{name}Storage"): dtype for name, dtype in {
    "Double": ("float64", 8), "Float": ("float32", 4), "BFloat16": ("bfloat16", 2), "Half": ("float16", 2),
    "Long": ("int64", 8), "Int": ("int32", 4), "Byte": ("uint8", 1), "Bool": ("bool", 1)}.items()}
"""Storage class -> dtype and bytes per number."""
NAMESPACE = Name("argparse", "Namespace")
_SETTINGS_PACKAGES = ("megatron", "torch", "transformer_engine", "nvidia_resiliency_ext", "numpy", "datetime",
                      "enum", "types")
"""Packages whose classes and enumerations occur in settings, where they are read as names."""
_PLAIN = {"set", "frozenset", "complex", "bytearray", "slice", "range"}
_CODECS = Name("_codecs", "encode")
"""Used by pickle protocol 2 for bytes."""


def is_tensor_name(name: Name) -> bool:
    """Return whether a stored tensor's header may contain a name."""
    return name in STORAGES or name in (REBUILT, PARAMETER, ORDERED)


def is_settings_name(name: Name) -> bool:
    """Return whether a checkpoint's settings may contain a name."""
    return (name in (NAMESPACE, ORDERED, _CODECS, MEMBER) or name.module.split(".")[0] in _SETTINGS_PACKAGES
            or (name.module in ("builtins", "__builtin__") and name.name in _PLAIN)
            or name.module in ("pathlib", "pathlib._local") or name == Name("signal", "Signals"))


# Index of a `torch_dist` checkpoint (`.metadata`, a pickled `torch.distributed.checkpoint.Metadata`):
# tensors, and the file and byte range of each block.

MAX_AXES = 8
MAX_SIZE = 1 << 48
"""Maximum axis, offset or file size."""
COMMON_STATE = "common_state/shard_0_1"
"""Settings key among the tensors, used by megatron-core since version 0.19."""
TRAINING_PREFIXES = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
"""Key prefixes for training state."""
STATE_KEY = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(exp_avg|exp_avg_sq|param|fp32_param)\.(.+)")
"""Megatron's key of AdamW's state for a weight; other training state is not imported."""
TORCH_STATE_KEY = re.compile(
    r"(?:.+\.)?optim(?:izer)?(?:\.\d+)?\.state\.(.+)\.(exp_avg|exp_avg_sq|momentum_buffer|step)")
"""Torch's key of AdamW's or Muon's state for a weight, as in `get_optimizer_state_dict`."""
Index = dict[str, Any]
"""JSON object. `tensors`: key -> [dtype, shape, pieces], with a piece [file, start, length, offset, shape];
`num_skipped`: optimizer tensors; `objects`: key -> [file, start, length] for values that are not tensors."""


def read_index(raw: bytes) -> Index:
    """Parse an index; raises ValueError for objects other than tensor metadata, and for invalid offsets."""
    try:
        metadata = get_attributes(parse_pickle(raw, _INDEX.__contains__), METADATA, MCORE_METADATA)
        entries = to_text_dict(metadata["state_dict_metadata"])
        stored = _read_stored(metadata["storage_data"])
        tensors: dict[str, Any] = {}
        objects, num_skipped = {}, 0
        for key, value in entries.items():
            if isinstance(value, InertCall) and value.name == BYTES:
                if (key, ()) in stored:
                    objects[key] = stored[key, ()]
            elif key.startswith(TRAINING_PREFIXES) and not (STATE_KEY.fullmatch(key)
                                                            or TORCH_STATE_KEY.fullmatch(key)):
                num_skipped += 1
            else:
                tensors[key] = _parse_tensor(key, value, stored)
    except KeyError as e:
        raise ValueError(f"it lacks {str(e)[:200]}") from None
    return {"tensors": tensors, "num_skipped": num_skipped, "objects": objects}


def _read_stored(value: Any) -> dict[tuple[str, tuple[int, ...]], list[Any]]:
    """Return (key, offset) -> [file, start, length] for stored blocks; objects have the offset ()."""
    if not isinstance(value, Items):
        raise ValueError("it does not list stored tensors")
    places = {}
    for place, info in value:
        index_entry = get_attributes(place, PLACE)
        if not isinstance(index_entry["fqn"], str):
            raise ValueError("a stored block has no key")
        offset = index_entry.get("offset")
        key = (index_entry["fqn"], () if offset is None else _parse_sizes(offset))
        stored = get_attributes(info, STORED)
        if stored.get("transform_descriptors"):
            raise ValueError(f"{index_entry['fqn'][:200]}: is compressed or transformed, which is not "
                             "supported")
        if key in places:
            raise ValueError(f"{index_entry['fqn'][:200]}: a block is stored twice")
        places[key] = [_parse_path(stored["relative_path"]), _parse_number(stored["offset"]),
                       _parse_number(stored["length"])]
    return places


def _parse_tensor(key: str, value: Any, stored: dict[tuple[str, tuple[int, ...]], list[Any]]) -> list[Any]:
    """Return [dtype, shape, pieces] as in `Index`; removes the tensor's blocks from `stored`."""
    tensor = get_attributes(value, TENSOR)
    shape, chunks = _parse_sizes(tensor["size"]), tensor["chunks"]
    dtype = _parse_dtype(tensor["properties"])
    if type(chunks) is not list or not chunks:
        raise ValueError(f"{key[:200]}: has no list of blocks")
    pieces = []
    for chunk in chunks:
        part = get_attributes(chunk, CHUNK)
        offset, extent = _parse_sizes(part["offsets"]), _parse_sizes(part["sizes"])
        if not len(shape) == len(offset) == len(extent) or any(
                o + n > size for o, n, size in zip(offset, extent, shape, strict=True)):
            raise ValueError(f"{key[:200]}: a block of {list(extent)} at {list(offset)} is outside the "
                             f"tensor of {list(shape)}")
        # `pop`, so that an index that repeats a block cannot exhaust memory.
        file, start, length = stored.pop((key, offset), ("", 0, 0))
        if not file:
            raise ValueError(f"{key[:200]}: the block at {list(offset)} is not stored")
        if math.prod(extent) > length:
            raise ValueError(f"{key[:200]}: the block of {list(extent)} at {list(offset)} has only {length} "
                             "bytes")
        pieces.append([file, start, length, offset, extent])
    return [dtype, shape, pieces]


def _parse_dtype(value: Any) -> str:
    """Return the dtype name, the first item in the tensor properties."""
    if not (isinstance(value, InertCall) and value.name == PROPERTIES):
        raise ValueError("a tensor has no properties")
    dtype = value.state[0] if isinstance(value.state, tuple) and value.state else None
    if not (isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in DTYPE_NAMES):
        raise ValueError("a tensor has no dtype")
    return dtype.name


def _parse_sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, InertCall) and value.name == SIZE and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)):
        raise ValueError("a torch.Size is needed")
    sizes = tuple(value)
    if len(sizes) > MAX_AXES:
        raise ValueError(f"a tensor has {len(sizes)} axes, more than {MAX_AXES}")
    return tuple(map(_parse_number, sizes))


def _parse_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ValueError("a size or offset is not an integer, negative, or too large")
    return value


def _parse_path(value: Any) -> str:
    parts = PurePosixPath(value).parts if isinstance(value, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or not value.isprintable():
        path = repr(value[:200]) if isinstance(value, str) else _describe_type(value)  # lists may be endless
        raise ValueError(f"a tensor is stored in {path}, which is outside the checkpoint folder")
    return str(value)


# Settings in a Megatron-LM checkpoint: `args` in `common.pt` or, alone or as a single-item list, in a tensor
# file.

MAX_VALUES = 200_000
"""Maximum number of setting values, including list items."""
MAX_DEPTH = 6


def read_settings(raw: bytes) -> dict[str, Any]:
    """Return `args`, `iteration`, scheduler and an optimizer's first group of a common.pt as JSON values;
    raises ValueError for a malformed file."""
    header = TorchArchive(io.BytesIO(raw), is_settings_name).header
    content = header[0] if type(header) is list and len(header) == 1 else header
    settings = {"args": content} if isinstance(content, InertCall) else to_text_dict(content)
    converter = _JsonConverter()
    args = get_attributes(settings["args"], NAMESPACE) if "args" in settings else {}
    return {"args": {name: converter.convert(value, 0) for name, value in args.items()},
            "iteration": converter.convert(settings.get("iteration"), 0),
            "scheduler": converter.convert(settings.get("opt_param_scheduler"), 0),
            "group": converter.convert(_find_group(settings.get("optimizer")), 0)}


def read_value(raw: bytes) -> dict[str, Any]:
    """Return a `torch.save` file's content as a JSON value; raises ValueError for a malformed file."""
    return {"value": _JsonConverter().convert(TorchArchive(io.BytesIO(raw)).header, 0)}


def _find_group(value: Any) -> Any:
    """Return the first group of the first optimizer; None if there is none."""
    if isinstance(value, list):
        return value[0] if value else None
    pairs = list(value) if isinstance(value, Items) else []
    return next((_find_group(item) for name in ("param_groups", "optimizer", 0) for key, item in pairs
                 if type(key) is type(name) and key == name), None)


class _JsonConverter:
    """Converts parsed values to JSON values, and counts the values."""

    def __init__(self) -> None:
        self._num_values = 0

    def convert(self, value: Any, depth: int) -> Any:
        """Return a JSON value; values unknown to JSON become text. Raises ValueError above `MAX_VALUES`."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError("its settings have too many values")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Name):
            return str(value).removeprefix("torch.")
        if isinstance(value, Items):
            return {str(key): self.convert(item, depth + 1) for key, item in value
                    if isinstance(key, (str, int, float, bool))}
        if isinstance(value, (list, tuple)):
            return [self.convert(item, depth + 1) for item in value]
        if isinstance(value, InertCall):  # member of an enumeration, path or duration
            return {"class": str(value.name), "of": self.convert(value.arguments, depth + 1)}
        return f"<{type(value).__name__}>"


# Files of `torch.save`: a zip archive with a pickled header and the bytes of each storage.

MAX_HEADER_BYTES = 256 << 20
_LOCAL_HEADER_BYTES = 30
"""A zip member's local file header, before name and extra field (PKWARE APPNOTE.TXT, 4.3.7)."""


class TorchArchive:
    """A `torch.save` file; `header` is the parsed pickle."""

    def __init__(self, file: Any, allowed: Callable[[Name], bool] = is_tensor_name) -> None:
        """Parse the header; raises ValueError for a malformed file or a forbidden name."""
        self._file, self._size_bytes = file, file.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                self._members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                header, order = self._members.get("data.pkl"), self._members.get("byteorder")
                if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
                       for info in self._members.values()):
                    raise ValueError("its archive is compressed or encrypted")
                if header is None or header.file_size > MAX_HEADER_BYTES:
                    raise ValueError(f"its archive has no header, or a header above {MAX_HEADER_BYTES} bytes")
                if order is not None and archive.read(order) != b"little":
                    raise ValueError("its bytes are big-endian")
                self.header = parse_pickle(archive.read(header), allowed)
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as e:
            raise ValueError(f"it is not a torch.save archive ({e}) in the format since torch 1.6") from None

    def locate_tensor(self, value: Any) -> tuple[str, tuple[int, ...], int]:
        """Return (dtype, shape, first byte) of a contiguous tensor in the header. Raises
        `ValueError`: `value` is not a tensor, is not contiguous, or exceeds its storage."""
        if isinstance(value, InertCall) and value.name == PARAMETER and value.arguments:
            value = value.arguments[0]
        if not (isinstance(value, InertCall) and value.name == REBUILT and len(value.arguments) >= 4):
            raise ValueError("its header does not describe a tensor")
        reference, first, shape, strides = value.arguments[:4]
        # ("storage", class, file name, device, number of elements), as `torch.save` writes it
        storage = reference.key if isinstance(reference, InertObject) else ()
        if not (isinstance(storage, tuple) and len(storage) == 5 and storage[0] == "storage"
                and isinstance(storage[1], Name) and storage[1] in STORAGES and isinstance(storage[2], str)):
            raise ValueError("its header names no known storage")
        if not (isinstance(shape, tuple) and isinstance(strides, tuple)
                and len(shape) == len(strides) <= MAX_AXES and all(
                    type(n) is int and 0 <= n <= MAX_SIZE for n in (storage[4], first, *shape, *strides))):
            raise ValueError("its header has invalid sizes")
        contiguous_strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
        if any(n > 1 and stride != contiguous_stride
               for n, stride, contiguous_stride in zip(shape, strides, contiguous_strides, strict=True)):
            raise ValueError(f"it is not contiguous (strides {list(strides)[:8]})")
        (dtype, itemsize), member = STORAGES[storage[1]], self._members.get(f"data/{storage[2]}")
        if member is None or member.file_size != storage[4] * itemsize:
            raise ValueError(f"its archive does not have the {storage[4]} numbers of the header")
        self._file.seek(member.header_offset)
        local_header = self._file.read(_LOCAL_HEADER_BYTES)
        # bytes 26 to 29: lengths of name and extra field, which stand before the data
        data_start = (member.header_offset + _LOCAL_HEADER_BYTES
                      + int.from_bytes(local_header[26:28], "little")
                      + int.from_bytes(local_header[28:30], "little"))
        count = math.prod(shape)
        if local_header[:4] != b"PK\3\4" or first + count > storage[4] or (
                data_start + member.file_size > self._size_bytes):
            raise ValueError("it exceeds its storage")
        return dtype, shape, data_start + first * itemsize


REMEDY = "restore the checkpoint from its source"
MAX_FILE_BYTES = 1 << 30
BASE_MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 29, 60  # memory limit; a file byte parses to about 50 bytes
BASE_TIME_S, BYTES_PER_S = 60, 200_000  # CPU time limit; about ten times the normal time


def parse_file(parse: Callable[[bytes], dict[str, Any]], path: Path, start: int = 0,
               length_bytes: int | None = None) -> dict[str, Any]:
    """Parse `length_bytes` (None: all) of a checkpoint file from byte `start` by `read_index`,
    `read_settings` or `read_value`. Raises `UserError`: the content is forbidden or malformed, or the file is
    too large or exceeds the limits."""
    try:
        size_bytes = path.stat().st_size if length_bytes is None else length_bytes
        if not path.is_file() or size_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it has {format_size(size_bytes)}, at most {format_size(MAX_FILE_BYTES)} are "
                             "supported")
        with open(path, "rb") as f, limit_resources(
                BASE_TIME_S + size_bytes / BYTES_PER_S, BASE_MEMORY_BYTES + MEMORY_PER_BYTE * size_bytes):
            f.seek(start)
            content = parse(f.read(size_bytes))
            json.dumps(content)  # text that is referenced many times exhausts memory where it is written
            return content
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {REMEDY}") from None
    except (MemoryError, CpuTimeExceeded):
        raise UserError(f"{path}: cannot be read: it needs more memory or time than a valid file of its "
                        f"size; {REMEDY}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read: {str(e)[:500]}; {REMEDY}") from None
