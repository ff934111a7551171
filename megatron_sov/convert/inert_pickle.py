"""Reads a pickle as data: the opcodes of plain values build them, and what would import or call something
builds an inert record of what it names.

A pickle is a program.  Here it runs on a machine that has no way to import, call or look up anything:
`GLOBAL` puts a `Name` on the stack, `REDUCE` and `NEWOBJ` a `InertCall` with the name and its arguments.
Names that are not allowed are refused where they stand, and opcodes that no writer of plain values emits are
not known at all.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """Return what a pickle says.

    Args:
        raw: the pickle.
        allowed: whether a name may stand in it.

    Raises:
        ValueError: it is cut off, holds a name that is not allowed, or does what pickles of plain values do
            not.
    """
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
    """Return the attributes that an object would have.

    Raises:
        ValueError: it is not one of the named kinds, or its attributes are not named once each.
    """
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
