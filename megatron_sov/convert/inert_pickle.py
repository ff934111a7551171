"""Reads a pickle as data: the opcodes of plain values build them, and what would import or call something
builds an inert record of what it names.

A pickle is a program.  Here it runs on a machine that has no way to import, call or look up anything:
`GLOBAL` puts a `Name` on the stack, `REDUCE` and `NEWOBJ` a `InertCall` with the name and its arguments.
Names that are not allowed are refused where they stand, and opcodes that no writer of plain values emits are
not known at all.

Index and settings of `torch_dist` checkpoints are read so in a process of its own, whose limits stop a file
that would fill the memory or never end.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_size
from megatron_sov.sandbox.restrictions import limit

MAX_SHOWN_CHARS = 80
"""Of a name out of a file, in a message."""
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE",
              "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
"""Opcodes whose argument is their value."""
_NOTHING = {"PROTO", "FRAME"}


@dataclass(frozen=True)
class Name:
    """What a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:MAX_SHOWN_CHARS]


class Items(list[tuple[Any, Any]]):
    """A dict as its pairs, in order: nothing of a file is hashed."""


class InertCall:
    """What a pickle would make by a call."""

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None
        """What it would be given afterwards."""
        self.items = Items()
        """What would be entered into it, where it is a mapping."""


@dataclass(frozen=True)
class InertObject:
    """A reference to what stands beside the pickle, e.g. a tensor's storage."""

    key: Any


class _Mark:
    """Where a run of values begins on the stack."""


def read(raw: bytes, allowed: Callable[[Name], bool]) -> Any:
    """Return the values of a pickle; ValueError where it is cut off, holds a name that is not allowed, or
    does what pickles of plain values do not."""
    machine = _Machine(allowed)
    for opcode, argument, position in pickletools.genops(raw):
        try:
            if opcode.name == "STOP":
                return machine.result()
            machine.do(opcode.name, argument)
        except (IndexError, KeyError, TypeError) as e:
            raise ValueError(f"at byte {position}, {opcode.name} does not fit what stands before it "
                             f"({type(e).__name__})") from None
    raise ValueError("it has no end")


class _Machine:
    """The stack and the memo."""

    def __init__(self, allowed: Callable[[Name], bool]) -> None:
        self._allowed = allowed
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._stack.append(_Mark()),
            "EMPTY_TUPLE": lambda: self._stack.append(()), "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_DICT": lambda: self._stack.append(Items()), "EMPTY_SET": lambda: self._stack.append([]),
            "TUPLE": lambda: self._stack.append(tuple(self._run())),
            "FROZENSET": lambda: self._stack.append(self._run()),
            "TUPLE1": lambda: self._tuple(1), "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "APPEND": lambda: self._extend([self._pop()]), "APPENDS": lambda: self._extend(self._run()),
            "ADDITEMS": lambda: self._extend(self._run()),
            "SETITEM": lambda: self._enter([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda: self._enter(self._run()),
            "STACK_GLOBAL": lambda: self._named([self._pop(), self._pop()][::-1]),
            "NEWOBJ": self._make, "REDUCE": self._make, "BUILD": self._build,
            "BINPERSID": lambda: self._stack.append(InertObject(self._pop())),
        }

    def do(self, opcode: str, argument: Any) -> None:
        """Do one step; ValueError, IndexError, KeyError or TypeError where it does not fit."""
        if opcode in _ARGUMENTS:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif opcode == "GLOBAL":
            self._named(argument.split(" ", 1))
        elif opcode in self._steps:
            self._steps[opcode]()
        elif opcode not in _NOTHING:
            raise ValueError(f"it holds the opcode {opcode}, which no pickle of plain values has")

    def result(self) -> Any:
        if len(self._stack) != 1 or isinstance(self._stack[0], _Mark):
            raise ValueError(f"it ends with {len(self._stack)} values in the place of one")
        return self._stack[0]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if isinstance(self._stack[-1], _Mark):
            raise TypeError("a mark stands where a value is needed")
        return self._stack[-1]

    def _run(self) -> list[Any]:
        """Return the values above the last mark, and take both away."""
        start = len(self._stack) - 1
        while not isinstance(self._stack[start], _Mark):
            start -= 1
            if start < 0:
                raise IndexError("there is no mark")
        values = self._stack[start + 1:]
        del self._stack[start:]
        return values

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)][::-1]
        self._stack.append(tuple(values))

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise TypeError("values are appended to what is no list")
        target.extend(values)

    def _enter(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise TypeError("a key has no value")
        target = self._top()
        pairs = target.items if isinstance(target, InertCall) else target
        if not isinstance(pairs, Items):
            raise TypeError("keys are entered into what is no dict")
        pairs.extend(zip(values[::2], values[1::2], strict=True))

    def _named(self, words: list[Any]) -> None:
        module, name = words
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name is no text")
        found = Name(module, name)
        if not self._allowed(found):
            raise ValueError(f"it names {str(found)!r}, which has no place in it")
        self._stack.append(found)

    def _make(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not (isinstance(name, Name) and isinstance(arguments, tuple)):
            raise TypeError("something is called that is no name")
        self._stack.append(InertCall(name, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, InertCall) or target.state is not None:
            raise TypeError("a state is given to what cannot have one")
        target.state = state


def fields(value: Any, *names: Name) -> dict[str, Any]:
    """Return the attributes that an object would have; ValueError where it is not of one of the named
    classes, or its attributes are not named once each."""
    if not (isinstance(value, InertCall) and value.name in names):
        raise ValueError(f"a {names[0].name} is needed where {_kind(value)} stands")
    return text_keys(value.state if value.state is not None else Items())


def text_keys(value: Any) -> dict[str, Any]:
    """Return a dict with text for keys; ValueError where it is none, or a key stands there twice."""
    if not isinstance(value, Items) or not all(isinstance(key, str) for key, _ in value):
        raise ValueError(f"a dict with text for keys is needed where {_kind(value)} stands")
    found = dict(value)
    if len(found) != len(value):
        raise ValueError("a key stands in a dict twice")
    return found


def _kind(value: Any) -> str:
    return str(value.name) if isinstance(value, InertCall) else f"a {type(value).__name__}"


# The names that may stand in a checkpoint's pickles.  None of them is ever imported.

_META, _PLAN = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
METADATA = Name(_META, "Metadata")
MCORE_METADATA = Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
"""The library's own class for it, up to 0.15."""
TENSOR, BYTES = Name(_META, "TensorStorageMetadata"), Name(_META, "BytesStorageMetadata")
PROPERTIES, CHUNK = Name(_META, "TensorProperties"), Name(_META, "ChunkStorageMetadata")
PLACE = Name(_META, "MetadataIndex")
STORED = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Name("torch", "Size")
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8",
               "bool", "float8_e4m3fn", "float8_e5m2")
MEMBER = Name("builtins", "getattr")
"""How Python 3.11 writes a member of an enumeration."""
_INDEX = {
    METADATA, MCORE_METADATA, TENSOR, BYTES, PROPERTIES, CHUNK, PLACE, STORED, SIZE,
    Name(_META, "StorageMeta"), Name(_META, "_MEM_FORMAT_ENCODING"),
    Name("torch.serialization", "_get_layout"),
    # plans of the processes, which the library keeps for the next time it saves
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
"""Name of a storage in torch -> dtype of its tensors, and bytes of a number."""
NAMESPACE = Name("argparse", "Namespace")
_OF_SETTINGS = ("megatron", "torch", "transformer_engine", "nvidia_resiliency_ext", "numpy", "datetime",
                "enum", "types")
"""Packages whose classes and enumerations stand among settings; they are told as names."""
_PLAIN = {"set", "frozenset", "complex", "bytearray", "slice", "range"}
_CODECS = Name("_codecs", "encode")
"""How protocol 2 writes bytes."""


def in_index(name: Name) -> bool:
    """Return whether a name may stand in the index."""
    return name in _INDEX


def in_tensor(name: Name) -> bool:
    """Return whether a name may stand in the header of a stored tensor."""
    return name in STORAGES or name in (REBUILT, PARAMETER, ORDERED)


def in_settings(name: Name) -> bool:
    """Return whether a name may stand in the settings that a checkpoint carries."""
    return (name in (NAMESPACE, ORDERED, _CODECS, MEMBER) or name.module.split(".")[0] in _OF_SETTINGS
            or (name.module in ("builtins", "__builtin__") and name.name in _PLAIN)
            or name.module in ("pathlib", "pathlib._local") or name == Name("signal", "Signals"))


# The index of a `torch_dist` checkpoint (`.metadata`, a pickled `torch.distributed.checkpoint.Metadata`):
# which tensors there are, and in which bytes of which file each part of them stands.

MAX_AXES = 8
MAX_SIZE = 1 << 48
"""Of an axis, an offset or a file."""
COMMON_STATE = "common_state/shard_0_1"
"""Key of the settings, which megatron-core from 0.19 on stores among tensors."""
OF_TRAINING = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
"""Beginnings of the keys of what only goes on with a run."""
Index = dict[str, Any]
"""As JSON: `tensors`: key -> [dtype, shape, pieces], a piece being [file, first byte, bytes, offset, shape];
`num_skipped`: tensors of the optimizer; `num_objects`: entries that are no tensors; `settings`: [file, first
byte, bytes] of the settings, None where they have a file of their own."""


def read_index(raw: bytes) -> Index:
    """Return the model's tensors in an index; ValueError where it holds anything but tensors' metadata, or
    places that cannot be."""
    try:
        metadata = fields(read(raw, in_index), METADATA, MCORE_METADATA)
        entries = text_keys(metadata["state_dict_metadata"])
        stored = _read_stored(metadata["storage_data"])
        tensors: dict[str, Any] = {}
        num_objects = num_skipped = 0
        for key, value in entries.items():
            if isinstance(value, InertCall) and value.name == BYTES:
                num_objects += 1
            elif key.startswith(OF_TRAINING):
                num_skipped += 1
            else:
                tensors[key] = _tensor(key, value, stored)
    except KeyError as e:
        raise ValueError(f"it lacks {str(e)[:200]}") from None
    return {"tensors": tensors, "num_objects": num_objects, "num_skipped": num_skipped,
            "settings": stored.get((COMMON_STATE, ()))}


def _read_stored(value: Any) -> dict[tuple[str, tuple[int, ...]], list[Any]]:
    """Return where each part of each tensor stands: [file, first byte, bytes]."""
    if not isinstance(value, list):
        raise ValueError("it does not say where tensors are stored")
    found = {}
    for place, info in value:
        where = fields(place, PLACE)
        if not isinstance(where["fqn"], str):
            raise ValueError("a stored part belongs to no name")
        is_settings = where["fqn"] == COMMON_STATE
        if where.get("offset") is None and not is_settings:  # an object, or a tensor that is no part
            continue
        at = (where["fqn"], () if is_settings else _sizes(where["offset"]))
        stored = fields(info, STORED)
        if stored.get("transform_descriptors"):
            raise ValueError(f"{where['fqn'][:200]}: is stored compressed, or transformed in another way, "
                             "which is not read")
        if at in found:
            raise ValueError(f"{where['fqn'][:200]}: a part of it is stored twice")
        found[at] = [_file(stored["relative_path"]), _number(stored["offset"]), _number(stored["length"])]
    return found


def _tensor(key: str, value: Any, stored: dict[tuple[str, tuple[int, ...]], list[Any]]) -> list[Any]:
    tensor = fields(value, TENSOR)
    shape, chunks = _sizes(tensor["size"]), tensor["chunks"]
    dtype = _dtype(tensor["properties"])
    if type(chunks) is not list or not chunks:
        raise ValueError(f"{key[:200]}: does not say what parts it has")
    pieces = []
    for chunk in chunks:
        part = fields(chunk, CHUNK)
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
    if not (isinstance(value, InertCall) and value.name == PROPERTIES):
        raise ValueError("a tensor has no properties")
    found = value.state[0] if isinstance(value.state, tuple) and value.state else None
    if not (isinstance(found, Name) and found.module == "torch" and found.name in DTYPE_NAMES):
        raise ValueError("a tensor has no dtype")
    return found.name


def _sizes(value: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    if not (isinstance(value, InertCall) and value.name == SIZE and len(value.arguments) == 1
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
    parts = PurePosixPath(value).parts if isinstance(value, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in value:
        raise ValueError(f"a tensor would stand in {str(value)[:200]!r}, which is not a file below the "
                         "checkpoint's folder")
    return str(value)


# The settings that a checkpoint of Megatron-LM carries: the `args` in its `common.pt`, or in a part of a file
# of tensors, which is the same in a list.

MAX_VALUES = 200_000
"""Of all settings together, lists counted out."""
MAX_DEPTH = 6


def read_settings(raw: bytes) -> dict[str, Any]:
    """Return `args` and `iteration` of a common.pt as JSON values, other values as text; ValueError where
    torch.save did not write it, or it holds names that settings do not have."""
    found = TorchArchive(io.BytesIO(raw), in_settings).header
    top = text_keys(found[0] if type(found) is list and len(found) == 1 else found)
    plain = _Plain()
    args = fields(top["args"], NAMESPACE) if "args" in top else {}
    return {"args": {name: plain.value(value, 0) for name, value in args.items()},
            "iteration": plain.value(top.get("iteration"), 0)}


class _Plain:
    """Turns values into JSON ones, and counts them."""

    def __init__(self) -> None:
        self._num_values = 0

    def value(self, value: Any, depth: int) -> Any:
        """Return a JSON value; ValueError where there are too many."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError("its settings hold more values than settings have")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Name):
            return str(value).removeprefix("torch.")
        if isinstance(value, Items):
            return {str(key): self.value(item, depth + 1) for key, item in value
                    if isinstance(key, (str, int, float, bool))}
        if isinstance(value, (list, tuple)):
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, InertCall):  # an enumeration's member, a path, a duration
            return {"class": str(value.name), "of": self.value(value.arguments, depth + 1)}
        return f"<{type(value).__name__}>"


# Tensors as `torch.save` wrote them: a zip archive with a pickled header, and the bytes of each storage.

MAX_HEADER_BYTES = 256 << 20
_LOCAL_HEADER_BYTES = 30
"""Of a member, before its name and what follows it (APPNOTE.TXT of PKWARE, 4.3.7)."""


class TorchArchive:
    """A file that `torch.save` wrote: `header` is its pickle as data."""

    def __init__(self, file: Any, allowed: Callable[[Name], bool] = in_tensor) -> None:
        """Read the header; ValueError where the file is no such archive, or a name is not allowed in it."""
        self._file, self._size_bytes = file, file.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                self._members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                header, order = self._members.get("data.pkl"), self._members.get("byteorder")
                if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
                       for info in self._members.values()):
                    raise ValueError("its archive is compressed or encrypted")
                if header is None or header.file_size > MAX_HEADER_BYTES:
                    raise ValueError(f"its archive has no header, or one above {MAX_HEADER_BYTES} bytes")
                if order is not None and archive.read(order) != b"little":
                    raise ValueError("its bytes are in big-endian order")
                self.header = read(archive.read(header), allowed)
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as e:
            raise ValueError(f"it is no archive of torch.save ({e}), as torch writes it from 1.6 "
                             "on") from None

    def find(self, made: Any) -> tuple[str, tuple[int, ...], int, int]:
        """Return dtype, shape, first byte in the file and bytes of a tensor of the header; ValueError for
        anything else, and for a tensor that does not stand row by row in its storage."""
        if isinstance(made, InertCall) and made.name == PARAMETER and made.arguments:
            made = made.arguments[0]
        if not (isinstance(made, InertCall) and made.name == REBUILT and len(made.arguments) >= 4):
            raise ValueError("its header describes no tensor")
        held, first, shape, strides = made.arguments[:4]
        stored = held.key if isinstance(held, InertObject) else ()
        if not (isinstance(stored, tuple) and len(stored) == 5 and stored[0] == "storage"
                and isinstance(stored[1], Name) and stored[1] in STORAGES and isinstance(stored[2], str)):
            raise ValueError("its header names no storage of numbers")
        if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
                and all(type(n) is int and 0 <= n <= MAX_SIZE for n in (stored[4], first, *shape, *strides))):
            raise ValueError("its header has no sizes")
        expected = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
        if any(n > 1 and stride != whole for n, stride, whole in zip(shape, strides, expected, strict=True)):
            raise ValueError(f"it does not stand row by row (strides {list(strides)[:8]})")
        (dtype, itemsize), member = STORAGES[stored[1]], self._members.get(f"data/{stored[2]}")
        if member is None or member.file_size != stored[4] * itemsize:
            raise ValueError(f"its archive does not hold the {stored[4]} numbers that the header says")
        self._file.seek(member.header_offset)
        local = self._file.read(_LOCAL_HEADER_BYTES)
        begin = (member.header_offset + _LOCAL_HEADER_BYTES + int.from_bytes(local[26:28], "little")
                 + int.from_bytes(local[28:30], "little"))
        count = math.prod(shape)
        if local[:4] != b"PK\3\4" or first + count > stored[4] or (
                begin + member.file_size > self._size_bytes):
            raise ValueError("it reaches beyond its bytes")
        return dtype, shape, begin + first * itemsize, count * itemsize


REMEDY = "restore the checkpoint from its source"
READERS = {"index": read_index, "settings": read_settings}
MAX_FILE_BYTES = 1 << 30
BASE_MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 29, 60
"""A value of one byte in a pickle is an object of some 50 bytes in memory."""
BASE_TIME_S, BYTES_PER_S = 60, 200_000
"""Processor time that is left to it: some ten times what it takes."""
CLOCK_FACTOR = 20
"""Times on the clock for the processor time, against a hang alone: processes share a machine."""
_CODE = ("import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
         "from megatron_sov.convert.inert_pickle import main; main(sys.argv[1])")


def read_apart(what: str, path: Path, start: int = 0, length_bytes: int | None = None) -> dict[str, Any]:
    """Return what a file of a checkpoint says.

    Args:
        what: name in `READERS`.
        path: the file.
        start: the first byte that is read.
        length_bytes: how many are; None: all.

    Raises:
        UserError: it holds what it should not, is too large, or the process was ended for what it took.
    """
    try:
        size_bytes = path.stat().st_size if length_bytes is None else length_bytes
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {REMEDY}") from None
    if not path.is_file() or size_bytes > MAX_FILE_BYTES:
        raise UserError(f"{path}: has {format_size(size_bytes)}, and at most {format_size(MAX_FILE_BYTES)} "
                        f"are read; {REMEDY}")
    time_s = BASE_TIME_S + size_bytes // BYTES_PER_S
    order = json.dumps({"what": what, "path": str(path.absolute()), "start": start,
                        "size_bytes": size_bytes,
                        "memory_bytes": BASE_MEMORY_BYTES + MEMORY_PER_BYTE * size_bytes, "time_s": time_s})
    paths = json.dumps([os.path.abspath(entry) for entry in sys.path if entry])
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _CODE, order, paths], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=CLOCK_FACTOR * time_s, check=False, cwd="/",
                              env={"PATH": os.defpath, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"})
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        answer = {"error": "it takes more memory or time than a file of its size can need"}
    if "error" in answer:
        raise UserError(f"{path}: is not read, for {answer['error']}; {REMEDY}")
    return dict(answer["found"])


def main(order: str) -> None:
    """Read one file, in the process that has been started for it."""
    asked = json.loads(order)
    limit(resource.RLIMIT_AS, asked["memory_bytes"])
    limit(resource.RLIMIT_CPU, asked["time_s"])
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    try:
        with open(asked["path"], "rb") as f:
            f.seek(asked["start"])
            found = READERS[asked["what"]](f.read(asked["size_bytes"]))
        # as a whole, in this memory: one text that is named again and again would fill that of the reader
        answer = json.dumps({"found": found})
    except MemoryError:
        answer = json.dumps({"error": "it takes more memory than a file of its size can need"})
    except (ValueError, OSError, RecursionError) as e:
        answer = json.dumps({"error": str(e)[:500]})
    sys.stdout.write(answer)
    sys.stdout.flush()
    # values nested a million deep would be taken apart one inside another
    os._exit(0)
