"""The process of the tests and that of the solution ask each other over a pair of sockets.

Plain data passes between them by its content.  Every other object stays in its process, and the other process
uses it from afar.  Runs inside of the sandbox, and imports nothing of this package.
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
    """The process of the solution has ended; no `Exception`, so that no test takes it for one it expects."""


class SolutionExit(SystemExit):
    """The solution has called `sys.exit`, which ends a test, as it would in one process, and fails it."""


class Peer:
    """One of the two processes: asks the other one, and answers it."""

    def __init__(self, channel: socket.socket, *, trusts: bool) -> None:
        self._channel, self._trusts = channel, trusts
        """A side that does not trust lets the other one see only what it hands out."""
        self.handed: dict[int, Any] = {}
        """Number -> what the other side has a `Remote` of."""
        self.errors: dict[str, type[Exception]] = {}
        """Errors of the solution's own."""
        self.num_uses = 0
        """Times that this side has used an object of the other one."""

    # --- messages

    def ask(self, operation: str, *values: Any, names: Sequence[str] = ()) -> Any:
        """Return the result of an operation on the other side, and answer its questions meanwhile.

        Raises:
            SolutionEnded: the other process has ended.
        """
        self.num_uses += 1
        self.send(["ask", operation, [self.encode_value(value) for value in values], list(names)])
        while True:
            # the other side may ask back before it answers: arguments of a call are used while it runs
            message = self.receive()
            if message[0] == "ask":
                self._answer_request(message)
                continue
            # a solution may sort its argument in place, and tests look at that list afterwards
            for value, changed in zip(values, message[2], strict=False):
                if changed is not None and isinstance(value, MUTABLE):
                    self._replace_content(value, self.decode_value(changed))
            if message[0] == "error":
                error = self._build_error(*message[1])
                if isinstance(error, StopIteration) and operation != "next":  # it would end a test's loop
                    raise RuntimeError("StopIteration")
                raise error
            return self.decode_value(message[1])

    def serve(self) -> None:
        """Answer until the other process ends, which raises `SolutionEnded`."""
        while True:
            self._answer_request(self.receive())

    def _answer_request(self, message: list[Any]) -> None:
        _, operation, encoded, names = message
        values: list[Any] = []
        try:
            values = [self.decode_value(value) for value in encoded]
            reply = ["value", self.encode_value(self._run_operation(operation, values, names))]
        # nobody is left to answer
        except SolutionEnded:
            raise
        except BaseException as e:
            kinds = [kind.__name__ for kind in type(e).__mro__]
            reply = ["error", [kinds, str(e)[:500]]]
        try:
            # after an error too: what was changed before it stays changed
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
        """Return the next message; raises SolutionEnded if the other process has ended."""
        (length,) = struct.unpack("<Q", self._read_bytes(8))
        # the length is the solution's claim: no memory is reserved for it unchecked
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

    # --- operations on what lives here

    def _run_operation(self, operation: str, values: list[Any], names: list[str]) -> Any:
        target, *rest = values
        # the solution may use what it was given, and not reach into the tests from there
        if not self._trusts and not any(target is handed for handed in self.handed.values()):
            raise TypeError("is no object that was handed out")
        if operation == "call":
            positional = len(rest) - len(names)
            return target(*rest[:positional], **dict(zip(names, rest[positional:], strict=True)))
        if operation in ("get", "set"):
            # of the tests' objects it sees public attributes of plain instances: not __class__, not
            # __globals__
            is_instance = type(target).__module__ == "__main__" and not isinstance(target, type)
            if not self._trusts and (not is_instance or rest[0].startswith("_")):
                raise AttributeError(rest[0])
        return OPERATIONS[operation](target, *rest)

    def _replace_content(self, value: Any, new: Any) -> None:
        value.clear()
        # in place: tests hold the object itself, and a new one would be another
        (value.update if hasattr(value, "update") else value.extend)(new)

    def _build_error(self, kinds: list[str], text: str) -> BaseException:
        """Return the error to raise here for one that the other side has raised.

        Args:
            kinds: names of its class and the bases of that.
            text: its message.
        """
        for name in kinds:
            kind = self.errors.get(name) or BUILT_IN_ERRORS.get(name)
            if kind is not None:
                try:
                    return kind(text)
                except TypeError:  # one that wants more than a text
                    continue
        if "SystemExit" in kinds:
            return SolutionExit(text)
        return RuntimeError(f"{kinds[0]}: {text}")  # such as KeyboardInterrupt, which is not to end the tests

    # --- values

    def encode_value(self, value: Any) -> list[Any]:
        """Return a value as JSON: plain data by its content, all else as a number to find it by."""
        # bool before int, for it is one; subclasses become the plain type, so that no __eq__ of theirs comes
        # along
        if value is None or isinstance(value, (bool, str)):
            return ["plain", str(value) if isinstance(value, str) else value]
        if isinstance(value, int):
            return ["plain", int(value)]
        if isinstance(value, float):
            # JSON of Python carries inf and nan as they are
            return ["plain", float(value)]
        # it goes home as itself: `f(x) is x` holds over there
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
        self.handed[number] = value  # kept, so that the number stays its own
        return ["coroutine" if isinstance(value, types.CoroutineType) else "mine", number]

    def decode_value(self, encoded: list[Any]) -> Any:
        """Return the value of what the other side has encoded."""
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
    """An object of the other process. Compared with data of this one it is never equal: else an object that
    says that it equals everything would pass every test."""

    def __init__(self, peer: Peer, number: int) -> None:
        # past `__setattr__` below, which would ask the other side
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
        # sets and keys of dicts need one; equal objects of the other side may differ in it
        return int(object.__getattribute__(self, "_number"))

    def __lt__(self, other: object) -> bool:
        # so that lists of a solution's objects can be sorted; against plain data it says nothing
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
    """Return the result of a coroutine of the other process, which runs to its end there."""
    return object.__getattribute__(remote, "_ask")("wait")


def run_coroutine(coroutine: Any) -> Any:
    """Return the result of a coroutine."""
    # asyncio takes 0.1 s to import, and few solutions need it
    return importlib.import_module("asyncio").run(coroutine)


class RemoteObject:
    """An iterator that stays where it is."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator


OPERATIONS: dict[str, Any] = {
    "get": getattr, "set": setattr,
    "equal": lambda a, b: bool(a == b), "less": lambda a, b: bool(a < b),
    "has instance": lambda kind, value: isinstance(value, kind), "iterate": lambda a: RemoteObject(iter(a)),
    # an iterator is wrapped, else it would be sent as a list of what it yields
    "next": lambda a: next(a.iterator if isinstance(a, RemoteObject) else a), "length": len, "truth": bool,
    "item": lambda a, key: a[key], "set item": lambda a, key, value: a.__setitem__(key, value),
    "text": str, "shown": repr, "wait": run_coroutine}
PLAIN_NUMBERS = (bool, int, float, complex, str, bytes)
"""Types that an item of numpy may become."""
COLLECTIONS: dict[str, Any] = {k.__name__: k for k in (list, tuple, set, frozenset, collections.deque)}
