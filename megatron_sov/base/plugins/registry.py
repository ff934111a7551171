"""Code by name, of one kind: built in, or named by a person as FILE.py:NAME; and orders for it, plain values
from which any process builds the same.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from megatron_sov.base.errors import Fix, UserError, find_misspelt, how_to_install, nearest
from megatron_sov.base.hints.removed import was_removed
from megatron_sov.base.plugins.loading import Kind, LoadedPlugin, PluginCode, is_reference, load, telling
from megatron_sov.base.settings import SettingsError, read_arguments, rules_of


def takes(function: Any, names: tuple[str, ...]) -> bool:
    """Return whether something can be called with so many arguments by position."""
    try:
        inspect.signature(function).bind(*names)
    except (TypeError, ValueError):
        return False
    return True


def check_methods(value: Any, reference: str, what: str, methods: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a class has methods that take what they will be given.

    Args:
        value: what was found.
        reference: where it stands.
        what: what it should be, e.g. "an objective".
        methods: name -> arguments behind `self`.

    Raises:
        UserError: it is no class, or a method is missing or takes something else; all of them are named.
    """
    shapes = {name: f"{name}({', '.join(('self', *arguments))})" for name, arguments in methods.items()}
    if not inspect.isclass(value):
        raise UserError(f"{reference}: is a {type(value).__name__}; "
                        f"{what} is a class with {', '.join(shapes.values())}")
    wrong = [name for name, arguments in methods.items()
             if not callable(getattr(value, name, None))
             or not takes(getattr(value, name), ("self", *arguments))]
    if wrong:
        found = [f"{name}{inspect.signature(getattr(value, name))}"
                 for name in wrong if callable(getattr(value, name, None))]
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise UserError(f"{reference}: {what} needs {', '.join(shapes[name] for name in wrong)}; {has}")


T = TypeVar("T")
MAX_PROPOSED = 3
"""Names that a message about an unknown one proposes."""
ABSENT = {"model family": ("is not supported", "families")}
"""What is said of an unknown one, and how several are called, where that is not "does not exist" and an s."""

LISTED_BY: dict[str, str] = {"recipe": "`megatron-sov recipes` lists them"}
"""What lists all that there are, where a message has no place for so many."""


@dataclass(frozen=True)
class _Known(Generic[T]):
    """Something that has been loaded and checked."""

    value: T
    code: PluginCode


class Registry(Generic[T]):
    """All code of one kind that is not built in.

    `load` runs a file and is for what a person named; `get` never does,
    and is for what configs and checkpoints say.
    """

    def __init__(self, kind: Kind, built_in: Collection[str],
                 check: Callable[[LoadedPlugin], None], own_name: Callable[[Any], str] | None = None,
                 adapt: Callable[[LoadedPlugin], LoadedPlugin] | None = None) -> None:
        """Nothing is looked for yet.

        Args:
            kind: what it holds.
            built_in: names that are taken.
            check: raises `UserError` for what is none of this kind.
            own_name: what it calls itself; without, its name in the file counts.
            adapt: makes one of what other libraries take for one; comes before `check`.
        """
        self.kind = kind
        self._adapt = adapt
        self._built_in, self._check, self._own_name = built_in, check, own_name
        self._known: dict[str, _Known[T]] = {}

    def load(self, reference: str) -> str:
        """Run the code that a person named; returns the name that it is known by from now on.

        Raises:
            UserError: it cannot be run, is none of this kind, or its name is taken.
        """
        return self.add(load(reference))

    def add(self, loaded: LoadedPlugin) -> str:
        """Take in what was loaded; returns its name.

        Raises:
            UserError: it is none of this kind, or its name is taken.
        """
        loaded = self._adapt(loaded) if self._adapt else loaded
        self._check(loaded)
        name = self._own_name(loaded.value) if self._own_name else loaded.attribute
        known = self._known.get(name)
        if name in self._built_in:
            raise UserError(f"{loaded.reference}: is called {name!r} like a built-in {self.kind}; "
                            "give it another name")
        # the same reference again is the same code: commands and configs may both name it
        if known is not None and known.code.reference != loaded.reference:
            raise UserError(f"{loaded.reference}: is called {name!r} like {known.code.reference}; "
                            "give one of them another name")
        code = PluginCode(self.kind, name, loaded.reference, loaded.files)
        self._known[name] = _Known(cast(T, loaded.value), code)
        return name

    def get(self, name: str, recorded: Sequence[PluginCode] = ()) -> T:
        """Return what has a name, if a person named its file or module before.

        Args:
            name: as settings have it.
            recorded: what a config or checkpoint says about its code, for the message alone.

        Raises:
            UserError: there is none; the message names the nearest, or says how to name the file
                that it stands in.
        """
        if name in self._known:
            return self._known[name].value
        close = nearest(name, [*self._built_in, *self._known])
        raise UserError(self._unknown(name, recorded),
                        Fix(words={name: close.split("'")[1]}) if close else None)

    def code(self, name: str) -> PluginCode | None:
        """Return the record of something that `load` or `get` has found; None for what is built in."""
        return self._known[name].code if name in self._known else None

    def listing(self) -> list[tuple[str, str]]:
        """Return (name, origin) of all that a person named."""
        return [(name, f"file {known.code.reference}") for name, known in self._known.items()]

    def named(self) -> list[str]:
        """Return the references that a person named, so that a process started from this one
        can be given them."""
        return [known.code.reference for known in self._known.values()]

    def _unknown(self, name: str, recorded: Sequence[PluginCode]) -> str:
        if is_reference(name):
            return (f"{self.kind} {name!r}: is a file or module, which is run only when the command line "
                    "itself names it; if you know it and trust it, name it with --set or --plugin")
        for code in recorded:
            # printable alone: the hint is a command to copy, and the reference is a stranger's
            if (code.kind, code.name) == (self.kind, name) and code.reference.isprintable():
                return (f"{self.kind} {name!r}: stands in {code.reference}, which is run only when the "
                        "command line itself names it; if you know it and trust it, "
                        f"add --plugin {shlex.quote(code.reference)}")
        known = [*self._built_in, *self._known]
        absent, plural = ABSENT.get(self.kind, ("does not exist", f"{self.kind}s"))
        listed = LISTED_BY.get(self.kind, f"{plural}: {', '.join(known)}")
        if self.kind in ABSENT:
            close = was_removed(name) or find_misspelt(name, known)
        else:
            close = (was_removed(name) or longer_names(name, known) or nearest(name, known)
                     or same_family(name, known))
        return f"{self.kind} {name!r}: {absent}{close} ({listed}; your own are named FILE.py:NAME)"


def longer_names(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x' or 'y'?"`` for names that begin with the parts of a shorter one, in any
    case and with any separator."""
    found = _beginning_with(_parts_of(name), known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def same_family(name: str, known: Iterable[str]) -> str:
    """Return ``"; its family has 'x' and 'y'"`` for names that begin with the same two parts: another number
    is another model, and no guess."""
    found = _beginning_with(_parts_of(name)[:2], known)
    return f"; its family has {' and '.join(found)}" if found else ""


def _beginning_with(parts: Sequence[str], known: Iterable[str]) -> list[str]:
    begins = [repr(one) for one in known if parts and _parts_of(one)[:len(parts)] == parts]
    return begins[:MAX_PROPOSED]


def _parts_of(name: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+", name.lower())


def load_built_in(what: str, place: str, extra: str) -> Any:
    """Import MODULE:CLASS of a built-in plug-in.

    Args:
        what: kind and name, for the message.
        place: MODULE:CLASS.
        extra: extra of our package that has the libraries of the class.

    Raises:
        UserError: a library is not installed.
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        raise UserError(f"{what}: needs {e.name}, which is not installed; {how_to_install(extra)}") from None


BuiltIn = Mapping[str, Sequence[str]]
"""Name -> module and class (and what else is known) of what is built in."""


@dataclass(frozen=True)
class PluginOrder:
    """Something that was asked for."""

    name: str
    """As it is built in."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    """FILE.py:NAME or MODULE:NAME of one that a person named; empty: it is known by name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 of what was loaded by that reference."""


@dataclass(frozen=True)
class BuiltPlugin:
    """What an order stands for."""

    value: Any
    """An object of its class."""
    settings: Mapping[str, Any]
    """What it was made with."""
    files: Mapping[str, str] | None
    """Hashes of its files; None: it is built in."""


def ordered(name: str, settings: Mapping[str, Any], built_in: BuiltIn,
            own: Registry[type[Any]]) -> PluginOrder:
    """Return the order for what a person named, built in or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, two have it, or its file cannot be run.
    """
    if name in built_in:
        return PluginOrder(name, settings)
    if is_reference(name):
        known_as = own.load(name)
        code = own.code(known_as)
        assert code is not None, f"{name} was loaded and has no record"
        return PluginOrder(known_as, settings, code.reference, code.files)
    # raises now where there is none; the order itself stays a name, which each process looks up
    own.get(name)
    return PluginOrder(name, settings)


def build(asked: PluginOrder, built_in: BuiltIn, own: Registry[type[Any]]) -> BuiltPlugin:
    """Return what an order stands for.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule (what `problems()` of the
            class says); all of them are named. Or its file fails, or has changed since it was ordered.
    """
    made, files = _class(asked, built_in, own)
    what = f"{own.kind} {asked.reference or asked.name}"
    settings = read_arguments(made, asked.settings, what)
    with telling(what):
        value = made(**settings)
        problems = rules_of(value)
    if problems:
        raise SettingsError(what, problems)
    return BuiltPlugin(value, settings, files)


def _class(asked: PluginOrder, built_in: BuiltIn, own: Registry[type[Any]],
           ) -> tuple[type[Any], Mapping[str, str] | None]:
    """Return a class, and the hashes of its files where it is not built in."""
    if asked.name in built_in:
        module, name = built_in[asked.name][:2]
        return getattr(importlib.import_module(module), name), None
    if asked.reference:
        own.load(asked.reference)
    made = own.get(asked.name)
    code = own.code(asked.name)
    files = code.files if code else {}
    # a process that starts later would go by other code under the same version
    changed = [name for name, digest in asked.files.items() if files.get(name, digest) != digest]
    if changed:
        raise UserError(f"{own.kind} {asked.reference}: {changed[0]} has changed since this command began; "
                        "run it again")
    return made, files
