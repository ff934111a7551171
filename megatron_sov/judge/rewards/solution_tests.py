"""The program that tests a solution, itself run in the sandbox: it is sent there as text, and imports nothing
of this package.

It first forks the process of the solution, and only then reads the tests, which therefore are nowhere in
that process. The two talk over a pair of sockets in plain data; what is no plain data stays where it is and
is used from afar. So a solution sees the arguments of its calls and nothing of what is expected, and nothing
that it prints, overwrites or exits with is taken for a verdict.
"""

from __future__ import annotations

import base64
import builtins
import collections
import ctypes
import decimal
import fractions
import importlib
import json
import os
import socket
import struct
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

SHARED_MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "statistics", "string", "typing",
)
"""Whose functions a solution and its tests have from the interpreter, each for itself."""
MUTABLE = (list, dict, set, bytearray, collections.deque)
MAX_MESSAGE_BYTES = 256 << 20
_PR_SET_DUMPABLE = 4
BUILT_IN_ERRORS = {name: kind for name, kind in vars(builtins).items()
                   if isinstance(kind, type) and issubclass(kind, Exception)}


class Peer:
    """One of the two processes: asks the other one, and answers it."""

    def __init__(self, channel: socket.socket, *, trusts: bool) -> None:
        self._channel, self._trusts = channel, trusts
        """A side that does not trust lets the other one see only what it hands out."""
        self.handed: dict[int, Any] = {}
        """Number -> what the other side has a `Remote` of."""
        self.errors: dict[str, type[Exception]] = {}
        """Errors of the solution's own."""

    # --- messages

    def ask(self, operation: str, *values: Any, names: Sequence[str] = ()) -> Any:
        """Return what an operation gives on the other side, answering what that asks meanwhile."""
        self.send(["ask", operation, [self.encoded(value) for value in values], list(names)])
        while True:
            # the other side may ask back before it answers: arguments of a call are used while it runs
            message = self.receive()
            if message[0] == "ask":
                self._answer(message)
                continue
            # a solution may sort its argument in place, and tests look at that list afterwards
            for value, changed in zip(values, message[2], strict=False):
                if changed is not None and isinstance(value, MUTABLE):
                    self._change(value, self.decoded(changed))
            if message[0] == "error":
                error = self._error(*message[1])
                if isinstance(error, StopIteration) and operation != "next":  # it would end a test's loop
                    raise RuntimeError("StopIteration")
                raise error
            return self.decoded(message[1])

    def serve(self) -> None:
        while True:
            self._answer(self.receive())

    def _answer(self, message: list[Any]) -> None:
        _, operation, encoded, names = message
        values: list[Any] = []
        try:
            values = [self.decoded(value) for value in encoded]
            told = ["value", self.encoded(self._done(operation, values, names))]
        # the other process has gone: there is nobody to tell
        except EOFError:
            raise
        except BaseException as e:
            kinds = [kind.__name__ for kind in type(e).__mro__]
            told = ["error", [kinds, str(e)[:500]]]
        try:
            # after an error too: what was changed before it stays changed
            changed = [self.encoded(value) if isinstance(value, MUTABLE) else None for value in values]
        except Exception:
            changed = []
        self.send([*told, changed])

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self._channel.sendall(struct.pack("<Q", len(data)) + data)

    def receive(self) -> Any:
        """Return the next message; raises EOFError where the other side has ended."""
        (length,) = struct.unpack("<Q", self._read(8))
        # the length is the solution's claim: no memory is reserved for it unchecked
        if length > MAX_MESSAGE_BYTES:
            raise EOFError(f"the other process announced a message of {length:,} bytes")
        return json.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._channel.recv(min(length, 1 << 20))
            if not part:
                raise EOFError("the process of the solution has ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    # --- operations on what lives here

    def _done(self, operation: str, values: list[Any], names: list[str]) -> Any:
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
            own = type(target).__module__ == "__main__" and not isinstance(target, type)
            if not self._trusts and (not own or rest[0].startswith("_")):
                raise AttributeError(rest[0])
        return OPERATIONS[operation](target, *rest)

    def _change(self, value: Any, new: Any) -> None:
        value.clear()
        # in place: tests hold the object itself, and a new one would be another
        (value.update if hasattr(value, "update") else value.extend)(new)

    def _error(self, kinds: list[str], text: str) -> Exception:
        for name in kinds:
            kind = self.errors.get(name) or BUILT_IN_ERRORS.get(name)
            if kind is not None:
                try:
                    return kind(text)
                except TypeError:  # one that wants more than a text
                    continue
        return RuntimeError(f"{kinds[0]}: {text}")  # such as SystemExit, which is not to end the tests

    # --- values

    def encoded(self, value: Any) -> list[Any]:
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
            return ["dict", [[self.encoded(k), self.encoded(v)] for k, v in value.items()]]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__, base64.b64encode(value).decode()]
        for name, kind in COLLECTIONS.items():
            if isinstance(value, kind):
                return [name, [self.encoded(item) for item in value]]
        if isinstance(value, range):
            return ["range", [value.start, value.stop, value.step]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, (decimal.Decimal, fractions.Fraction)):
            return [type(value).__name__, str(value)]
        number = id(value)
        self.handed[number] = value  # kept, so that the number stays its own
        return ["mine", number]

    def decoded(self, encoded: list[Any]) -> Any:
        """Return the value of what the other side has encoded."""
        kind, content = encoded
        if kind == "plain":
            return content
        if kind == "mine":
            return Remote(self, content)
        if kind == "yours":
            return self.handed[content]
        if kind == "dict":
            return {self.decoded(k): self.decoded(v) for k, v in content}
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(base64.b64decode(content))
        if kind in ("range", "complex"):
            return (range if kind == "range" else complex)(*content)
        if kind in ("Decimal", "Fraction"):
            return (decimal.Decimal if kind == "Decimal" else fractions.Fraction)(content)
        return COLLECTIONS[kind](self.decoded(item) for item in content)


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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._ask("equal", other))

    def __hash__(self) -> int:
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


class RemoteObject:
    """An iterator that stays where it is."""

    def __init__(self, held: Any) -> None:
        self.held = held


OPERATIONS: dict[str, Any] = {
    "get": getattr, "set": setattr,
    "equal": lambda a, b: bool(a == b), "less": lambda a, b: bool(a < b),
    "has instance": lambda kind, value: isinstance(value, kind), "iterate": lambda a: RemoteObject(iter(a)),
    # an iterator is wrapped, else it would be sent as a list of what it yields
    "next": lambda a: next(a.held if isinstance(a, RemoteObject) else a), "length": len, "truth": bool,
    "item": lambda a, key: a[key], "set item": lambda a, key, value: a.__setitem__(key, value),
    "text": str, "shown": repr}
COLLECTIONS: dict[str, Any] = {k.__name__: k for k in (list, tuple, set, frozenset, collections.deque)}


def be_solution(source: str, channel: socket.socket) -> None:
    """Run a solution, tell which names it has, and do what is asked of them."""
    peer = Peer(channel, trusts=True)
    main = types.ModuleType("__main__")
    # classes of the solution have `__module__` "__main__", by which `_done` knows them
    sys.modules["__main__"] = main
    try:
        exec(compile(source, "solution.py", "exec"), main.__dict__)
    except BaseException as e:
        peer.send({"error": "".join(traceback.format_exception_only(type(e), e)).strip()[-500:]})
        return
    # the tests' side gets a description and makes the names itself: nothing of the solution is run there
    names: dict[str, list[Any]] = {}
    for name, value in list(vars(main).items()):
        if name.startswith("__"):
            continue
        if isinstance(value, types.ModuleType):
            names[name] = ["module", value.__name__]
        # math.gcd is the same on both sides: each side uses its own
        elif getattr(value, "__module__", None) in SHARED_MODULES and isinstance(
                getattr(value, "__name__", None), str):
            names[name] = ["shared", [value.__module__, value.__name__]]
        elif isinstance(value, type) and issubclass(value, Exception):
            names[name] = ["error class", [kind.__name__ for kind in value.__mro__]]
        else:
            try:
                names[name] = ["value", peer.encoded(value)]
            except Exception:  # it lies in itself, say
                continue
    peer.send(names)
    peer.serve()


def names_of(told: dict[str, list[Any]], peer: Peer) -> dict[str, Any]:
    """Return what the tests find of a solution's names: nothing by which they would compare."""
    found: dict[str, Any] = {}
    for name, (kind, content) in told.items():
        # what tests call abs or set, and where Python finds these, is not the solution's
        if hasattr(builtins, name) or name.startswith("__"):
            continue
        if name in SHARED_MODULES:
            found[name] = importlib.import_module(name)
        elif kind == "module" and content in SHARED_MODULES:
            found[name] = importlib.import_module(content)
        elif kind == "shared" and content[0] in SHARED_MODULES:
            if (value := getattr(importlib.import_module(content[0]), content[1], None)) is not None:
                found[name] = value
        elif kind == "error class":
            base = next((BUILT_IN_ERRORS[base] for base in content if base in BUILT_IN_ERRORS), Exception)
            found[name] = peer.errors[content[0]] = type(content[0], (base,), {})
        elif kind == "value":
            found[name] = peer.decoded(content)
    return found


def run_test(source: str, names: dict[str, Any], entry_point: str) -> None:
    """Run a test's text, then the functions that it defines to be called."""
    before = dict(names)
    exec(compile(source, "test.py", "exec"), names)
    # only functions that this test has defined: names of tests before it are still there
    for name, value in list(names.items()):
        if before.get(name) is value or not isinstance(value, types.FunctionType):
            continue
        if name == "check" and entry_point:
            # HumanEval's form: `def check(candidate)`
            value(names[entry_point])
        elif name.startswith("test"):
            value()


def plain(value: Any) -> Any:
    """Return data as JSON has it: tuples are lists there."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_exactly(length: int) -> bytes:
    """Return so many bytes of the input, and take no more from it."""
    parts = []
    while length and (part := os.read(0, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def tell(fd: int, **what: Any) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def main() -> None:
    """Read a solution, fork its process, read the tests, and run them."""
    # whole numbers pass between the two as decimal text, of which Python takes 4,300 digits by default
    sys.set_int_max_str_digits(0)
    # no buffered reader: it would take the tests behind the source into memory before the fork
    source = read_exactly(int(read_exactly(12))).decode()
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)  # else /proc/PID/fd leads the solution to input and verdict
    here, there = socket.socketpair()
    if os.fork() == 0:
        here.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        try:
            be_solution(source, there)
        finally:
            os._exit(0)
    there.close()
    # a file named json.py there would be imported by the tests
    sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.getcwd()]  # the solution writes there
    # the verdict goes over a copy that no test prints to
    verdict = os.dup(1)
    os.dup2(2, 1)  # what tests print is no verdict
    request = json.loads(read_exactly(int(read_exactly(12))))
    peer = Peer(here, trusts=False)
    try:
        told = peer.receive()
        if isinstance(told.get("error"), str):
            tell(verdict, loaded=False, reason=told["error"])
            return
        names = {**names_of(told, peer), "__name__": "__main__", "__plain__": plain}
    except Exception as e:
        tell(verdict, loaded=False, reason=f"{type(e).__name__}: {e}")
        return
    failed = False
    for index, test in enumerate(request["tests"]):
        try:
            run_test(test, names, request["entry_point"])
            tell(verdict, test=index, passed=True)
        except Exception as e:
            # the first reason alone: those of thousands of tests would pass the limit of an output
            tell(verdict, test=index, passed=False, reason="" if failed else f"{type(e).__name__}: {e}"[:300])
            failed = True
    tell(verdict, done=True)


if __name__ == "__main__":
    main()
