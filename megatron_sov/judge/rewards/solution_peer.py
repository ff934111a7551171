"""Protocol between the test process and the solution process over a socket pair.

Plain data are sent by value; other objects stay in their process and are used through proxies. The code is
sent to the sandbox as text and imports nothing from this package.
"""

from __future__ import annotations

import base64
import builtins
import collections
import decimal
import fractions
import importlib
import json
import re
import socket
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

MUTABLE = (list, dict, set, bytearray, collections.deque)
MAX_MESSAGE_BYTES = 256 << 20
BUILT_IN_ERRORS = {name: kind for name, kind in vars(builtins).items()
                   if isinstance(kind, type) and issubclass(kind, Exception)}
_NUMPY_TYPE = re.compile(r"[<>|=][biufcSU]\d+")


class SolutionEnded(BaseException):
    """The solution process ended; not an `Exception`, so that tests cannot expect it."""


class SolutionExit(SystemExit):
    """The solution called `sys.exit`, which ends and fails the test."""


class Peer:
    """Either process: sends requests and answers requests."""

    def __init__(self, channel: socket.socket, *, trusts: bool) -> None:
        self._channel, self._trusts = channel, trusts
        """An untrusting side only gives access to objects that it sent."""
        self.handed: dict[int, Any] = {}
        """Number -> object behind a `Remote` in the other process."""
        self.errors: dict[str, type[Exception]] = {}
        """Error classes defined by the solution."""
        self.num_uses = 0
        """Requests sent by this side."""

    # --- messages

    def ask(self, operation: str, *values: Any, names: Sequence[str] = ()) -> Any:
        """Request an operation and return its result, answering requests in the meantime.

        Raises:
            SolutionEnded: the other process ended.
        """
        self.num_uses += 1
        self.send(["ask", operation, [self.encode_value(value) for value in values], list(names)])
        while True:
            # The other side may send requests before it answers, because arguments are used during a call.
            message = self.receive()
            if message[0] == "ask":
                self._answer_request(message)
                continue
            # A solution may sort its argument in place, and tests may look at the list.
            for value, changed in zip(values, message[2], strict=False):
                if changed is not None and isinstance(value, MUTABLE):
                    self._replace_content(value, self.decode_value(changed))
            if message[0] == "error":
                error = self._build_error(*message[1])
                # Would silently end a loop in a test.
                if isinstance(error, StopIteration) and operation != "next":
                    raise RuntimeError("StopIteration")
                raise error
            return self.decode_value(message[1])

    def serve(self) -> None:
        """Answer requests until `SolutionEnded`."""
        while True:
            self._answer_request(self.receive())

    def _answer_request(self, message: list[Any]) -> None:
        _, operation, encoded, names = message
        values: list[Any] = []
        try:
            values = [self.decode_value(value) for value in encoded]
            reply = ["value", self.encode_value(self._run_operation(operation, values, names))]
        # No recipient is left.
        except SolutionEnded:
            raise
        except BaseException as e:
            kinds = [kind.__name__ for kind in type(e).__mro__]
            reply = ["error", [kinds, str(e)[:500]]]
        try:
            # Also after errors: earlier changes persist.
            changed = [self.encode_value(value) if isinstance(value, MUTABLE) else None for value in values]
        except Exception:
            changed = []
        self.send([*reply, changed])

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self._channel.sendall(struct.pack("<Q", len(data)) + data)
        except OSError as e:
            raise SolutionEnded(f"the process of the solution has ended ({e.strerror})") from None

    def receive(self) -> Any:
        """Return the next message; raises SolutionEnded if the other process ended."""
        (length,) = struct.unpack("<Q", self._read_bytes(8))
        # The length is untrusted, so check it before reserving memory.
        if length > MAX_MESSAGE_BYTES:
            raise SolutionEnded(f"the solution announced a message of {length:,} bytes")
        return json.loads(self._read_bytes(length))

    def _read_bytes(self, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = self._channel.recv(min(length, 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise SolutionEnded("the process of the solution has ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    # --- operations on local objects

    def _run_operation(self, operation: str, values: list[Any], names: list[str]) -> Any:
        target, *rest = values
        # The solution may use the objects that it received, without access to the tests.
        if not self._trusts and not any(target is handed for handed in self.handed.values()):
            raise TypeError("is no object that was handed out")
        if operation == "call":
            positional = len(rest) - len(names)
            return target(*rest[:positional], **dict(zip(names, rest[positional:], strict=True)))
        if operation in ("get", "set"):
            # Only public attributes of plain instances in tests, not __class__ or __globals__.
            is_instance = type(target).__module__ == "__main__" and not isinstance(target, type)
            if not self._trusts and (not is_instance or rest[0].startswith("_")):
                raise AttributeError(rest[0])
        return OPERATIONS[operation](target, *rest)

    def _replace_content(self, value: Any, new: Any) -> None:
        value.clear()
        # In place, because tests hold the object itself.
        (value.update if hasattr(value, "update") else value.extend)(new)

    def _build_error(self, kinds: list[str], text: str) -> BaseException:
        """Build the exception for an error in the other process.

        Args:
            kinds: names of the error's class and bases.
            text: message.
        """
        for name in kinds:
            kind = self.errors.get(name) or BUILT_IN_ERRORS.get(name)
            if kind is not None:
                try:
                    return kind(text)
                except TypeError:  # needs more arguments than a text
                    continue
        if "SystemExit" in kinds:
            return SolutionExit(text)
        return RuntimeError(f"{kinds[0]}: {text}")  # such as KeyboardInterrupt, which must not end the tests

    # --- values

    def encode_value(self, value: Any) -> list[Any]:
        """Encode plain data by value, and other objects by number."""
        # bool before int, because bool is an int. Subclasses become the plain type, without their own __eq__.
        if value is None or isinstance(value, (bool, str)):
            return ["plain", str(value) if isinstance(value, str) else value]
        if isinstance(value, int):
            return ["plain", int(value)]
        if isinstance(value, float):
            # Python's JSON supports inf and nan.
            return ["plain", float(value)]
        # Returned as the original object, so that `f(x) is x` holds.
        if isinstance(value, Remote):
            return ["yours", object.__getattribute__(value, "_number")]
        if isinstance(value, dict):
            return ["dict", [[self.encode_value(k), self.encode_value(v)] for k, v in value.items()]]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__, base64.b64encode(value).decode()]
        for name, kind in COLLECTIONS.items():
            if isinstance(value, kind):
                return [name, [self.encode_value(item) for item in value]]
        if isinstance(value, range):
            return ["range", [value.start, value.stop, value.step]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, (decimal.Decimal, fractions.Fraction)):
            return [type(value).__name__, str(value)]
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic) and type(value.item()) in PLAIN_NUMBERS:
            return self.encode_value(value.item())
        if numpy is not None and isinstance(value, numpy.ndarray) and _NUMPY_TYPE.fullmatch(value.dtype.str):
            return ["ndarray",
                    [value.dtype.str, list(value.shape), self.encode_value(value.ravel().tolist())]]
        number = id(value)
        self.handed[number] = value  # kept alive, so that the number stays unique
        return ["coroutine" if isinstance(value, types.CoroutineType) else "mine", number]

    def decode_value(self, encoded: list[Any]) -> Any:
        """Decode a value from the other process; inverse of `encode_value`."""
        kind, content = encoded
        if kind == "plain":
            return content
        if kind == "mine":
            return Remote(self, content)
        if kind == "coroutine":
            return await_remote(Remote(self, content))
        if kind == "ndarray":
            return self._decode_array(*content)
        if kind == "yours":
            return self.handed[content]
        if kind == "dict":
            return {self.decode_value(k): self.decode_value(v) for k, v in content}
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(base64.b64decode(content))
        if kind in ("range", "complex"):
            return (range if kind == "range" else complex)(*content)
        if kind in ("Decimal", "Fraction"):
            return (decimal.Decimal if kind == "Decimal" else fractions.Fraction)(content)
        return COLLECTIONS[kind](self.decode_value(item) for item in content)

    def _decode_array(self, dtype: str, shape: list[int], values: list[Any]) -> Any:
        if not _NUMPY_TYPE.fullmatch(dtype):
            raise ValueError(f"{dtype!r} is no type of an array")
        return importlib.import_module("numpy").array(self.decode_value(values), dtype).reshape(shape)


class Remote:
    """Proxy for an object in the other process.

    A proxy never equals local data: an object that claims to equal everything would pass every test.
    """

    def __init__(self, peer: Peer, number: int) -> None:
        # Bypass `__setattr__` below, which would send a request.
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, *values: Any, names: Sequence[str] = ()) -> Any:
        return object.__getattribute__(self, "_peer").ask(operation, self, *values, names=names)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._ask("call", *positional, *named.values(), names=list(named))

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def _note_use(self) -> None:
        object.__getattribute__(self, "_peer").num_uses += 1

    def __eq__(self, other: object) -> bool:
        object.__getattribute__(self, "_note_use")()
        return isinstance(other, Remote) and bool(self._ask("equal", other))

    def __hash__(self) -> int:
        object.__getattribute__(self, "_note_use")()
        # For sets and dict keys; equal remote objects may have different hashes.
        return int(object.__getattribute__(self, "_number"))

    def __lt__(self, other: object) -> bool:
        # For sorting lists with a solution's objects; not comparable with plain data.
        return bool(self._ask("less", other)) if isinstance(other, Remote) else NotImplemented

    def __contains__(self, value: object) -> bool:
        return any(item == value for item in self)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and bool(self._ask("has instance", value))

    def __iter__(self) -> Any:
        return self._ask("iterate")

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __bool__(self) -> bool:
        return bool(self._ask("truth"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set item", key, value)

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __repr__(self) -> str:
        return str(self._ask("shown"))


async def await_remote(remote: Remote) -> Any:
    """Await a coroutine that runs to its end in the other process."""
    return object.__getattribute__(remote, "_ask")("wait")


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine and return its result."""
    # asyncio takes 0.1 s to import, and few solutions need it.
    return importlib.import_module("asyncio").run(coroutine)


class RemoteObject:
    """Iterator that stays in its process."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator


OPERATIONS: dict[str, Any] = {
    "get": getattr, "set": setattr,
    "equal": lambda a, b: bool(a == b), "less": lambda a, b: bool(a < b),
    "has instance": lambda kind, value: isinstance(value, kind), "iterate": lambda a: RemoteObject(iter(a)),
    # Iterators are wrapped; otherwise their items would be sent as a list.
    "next": lambda a: next(a.iterator if isinstance(a, RemoteObject) else a), "length": len, "truth": bool,
    "item": lambda a, key: a[key], "set item": lambda a, key, value: a.__setitem__(key, value),
    "text": str, "shown": repr, "wait": run_coroutine}
PLAIN_NUMBERS = (bool, int, float, complex, str, bytes)
"""Types that `numpy` items may convert to."""
COLLECTIONS: dict[str, Any] = {k.__name__: k for k in (list, tuple, set, frozenset, collections.deque)}
