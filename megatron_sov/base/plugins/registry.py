"""Registries of plug-ins by kind and name, and requests from which any process builds an equal plug-in."""

import importlib
import inspect
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from megatron_sov.base.errors import (
    Fix, UserError, choose_free_path, find_nearest_name, format_install_command, suggest_name,
    suggest_spelling)
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.hints.table import find_our_value, load_table
from megatron_sov.base.plugins.loading import (
    Kind, LoadedPlugin, PluginCode, is_reference, load_plugin, report_plugin_errors)
from megatron_sov.base.settings import SettingsError, find_rule_problems, parse_arguments

T = TypeVar("T")
MAX_PROPOSED = 3
"""Number of names suggested for an unknown name."""
UNKNOWN_WORDINGS = {"model family": ("is not supported", "families")}
"""Kind -> (predicate for an unknown name, plural), if they are not "does not exist" and a plural with s."""
LIST_COMMANDS: dict[str, str] = {"recipe": "`megatron-sov recipes` lists them"}
"""Kind -> command that lists the names, where the names are too many for a message."""
BuiltIn = Mapping[str, Sequence[str]]
"""Name -> module, class and further properties, for built-in plug-ins."""


def accepts_arguments(function: Any, names: tuple[str, ...]) -> bool:
    """Return whether a function accepts the named arguments by position."""
    try:
        inspect.signature(function).bind(*names)
    except (TypeError, ValueError):
        return False
    return True


def check_methods(value: Any, reference: str, what: str, methods: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a plug-in class has the required methods.

    Args:
        reference: its reference, for messages.
        what: expected kind, e.g. "an objective".
        methods: name -> arguments after `self`.

    Raises:
        UserError: `value` is not a class, or lists all missing methods and those with other arguments.
    """
    shapes = {name: f"{name}({', '.join(('self', *arguments))})" for name, arguments in methods.items()}
    if not inspect.isclass(value):
        raise UserError(f"{reference}: is a {type(value).__name__}; "
                        f"{what} is a class with {', '.join(shapes.values())}")
    wrong = [name for name, arguments in methods.items() if not callable(getattr(value, name, None))
             or not accepts_arguments(getattr(value, name), ("self", *arguments))]
    if wrong:
        signatures = [f"{name}{inspect.signature(getattr(value, name))}"
                      for name in wrong if callable(getattr(value, name, None))]
        available = f"it has {', '.join(signatures)}" if signatures else "it has none"
        raise UserError(f"{reference}: {what} needs {', '.join(shapes[name] for name in wrong)}; {available}")


@dataclass(frozen=True)
class _Known(Generic[T]):
    """A loaded and checked plug-in."""

    value: T
    code: PluginCode


class Registry(Generic[T]):
    """Plug-ins of a kind.

    `load` executes code and accepts only references from the command line. `get` only looks up names, and is
    safe for names from configs and checkpoints.
    """

    def __init__(self, kind: Kind, built_in: Collection[str],
                 check: Callable[[LoadedPlugin], None], own_name: Callable[[Any], str] | None = None,
                 adapt: Callable[[LoadedPlugin], LoadedPlugin] | None = None) -> None:
        """Create an empty registry.

        Args:
            kind: kind of the plug-ins.
            built_in: reserved names of built-in code.
            check: raises `UserError` if an object is not of this kind.
            own_name: returns an object's name; None: its name in its file.
            adapt: converts objects made for other libraries; runs before `check`.
        """
        self.kind = kind
        self._adapt = adapt
        self._built_in, self._check, self._own_name = built_in, check, own_name
        self._known: dict[str, _Known[T]] = {}

    def load(self, reference: str) -> str:
        """Execute code named by the user, and return the registered name. Raises `UserError`: the code fails,
        is not of this kind, or its name is taken."""
        return self.add(load_plugin(reference))

    def add(self, loaded: LoadedPlugin) -> str:
        """Register an object, and return its name. Raises `UserError`: another kind, or a taken name."""
        loaded = self._adapt(loaded) if self._adapt else loaded
        self._check(loaded)
        name = self._own_name(loaded.value) if self._own_name else loaded.attribute
        registered = self._known.get(name)
        if name in self._built_in:
            raise UserError(f"{loaded.reference}: is called {name!r} like a built-in {self.kind}; "
                            "give it another name")
        # the same reference is the same code: commands and configs may both name it
        if registered is not None and registered.code.reference != loaded.reference:
            raise UserError(f"{loaded.reference}: is called {name!r} like {registered.code.reference}; "
                            "give one of them another name")
        code = PluginCode(self.kind, name, loaded.reference, loaded.files)
        self._known[name] = _Known(cast(T, loaded.value), code)
        return name

    def get(self, name: str, recorded: Sequence[PluginCode] = ()) -> T:
        """Return a registered object by name. `recorded`: records of code in a
        config or checkpoint, for the error message only. Raises `UserError`: the name is unknown; the message
        suggests similar names, or how to name the recorded file."""
        if name in self._known:
            return self._known[name].value
        names = [*self._built_in, *self._known]
        part = next((other for other in names if other in re.split(r"[_-]", name)), "")  # length_penalty
        nearest = find_nearest_name(name, names) or _find_same_size(name, names) or part
        if meant := find_our_value(name, f"--{self.kind}"):
            raise UserError(f"{self.kind} {name!r}: is {meant} here; write {meant}", Fix(words={name: meant}))
        sentence = self._explain_unknown(name, recorded)
        if nearest:
            # another family is another architecture: only `_explain_unknown` suggests one, for a misspelling
            is_suggested = repr(nearest) in sentence or self.kind in UNKNOWN_WORDINGS
            question = "" if is_suggested else f"; did you mean {nearest!r}?"
            raise UserError(sentence + question, Fix(words={name: nearest}))
        if self.kind == "recipe" and re.search(r"\d", name) and not is_reference(name):  # a model's name
            nearest = _find_nearest_size(name, names)
            raise UserError(f"{sentence}; the nearest in size is {nearest!r}; weights of a published model "
                            "are --from HF_DIR (`hf download OWNER/NAME --local-dir HF_DIR`)",
                            Fix(words={name: nearest}, stand_ins={name: nearest}))
        if (lines := load_table()["skeletons"].get(self.kind)) and not is_reference(name):
            raise UserError(f"{sentence}; begin yours with this file", _fix_by_skeleton(name, lines))
        raise UserError(sentence,
                        Fix(stand_ins={name: max(self._built_in, key=lambda n: "tiny" in n, default=name)}))

    def code(self, name: str) -> PluginCode | None:
        """Return a registered plug-in's record; None for built-in code."""
        return self._known[name].code if name in self._known else None

    def listing(self) -> list[tuple[str, str]]:
        """Return (name, origin) per registered plug-in."""
        return [(name, f"file {plugin.code.reference}") for name, plugin in self._known.items()]

    def named(self) -> list[str]:
        """Return the registered plug-ins' references, for starting another process with the same plug-ins."""
        return [plugin.code.reference for plugin in self._known.values()]

    def _explain_unknown(self, name: str, recorded: Sequence[PluginCode]) -> str:
        """Return the message for an unknown name: a file, a plug-in that the run recorded, or a typo."""
        if is_reference(name):
            return (f"{self.kind} {name!r}: is a file or module, which is run only when the command line "
                    "itself names it; if you know it and trust it, name it with --set or --plugin")
        for code in recorded:
            # printable references only: the user will copy this command, and a stranger wrote the reference
            if (code.kind, code.name) == (self.kind, name) and code.reference.isprintable():
                return (f"{self.kind} {name!r}: stands in {code.reference}, which is run only when the "
                        "command line itself names it; if you know it and trust it, "
                        f"add --plugin {shlex.quote(code.reference)}")
        names = [*self._built_in, *self._known]
        absent, plural = UNKNOWN_WORDINGS.get(self.kind, ("does not exist", f"{self.kind}s"))
        listed = LIST_COMMANDS.get(self.kind, f"{plural}: {', '.join(names)}")
        if self.kind in UNKNOWN_WORDINGS:
            close = suggest_successor(name) or suggest_spelling(name, names)
        else:
            close = (suggest_successor(name) or suggest_longer_names(name, names) or suggest_name(name, names)
                     or suggest_same_family(name, names))
        return f"{self.kind} {name!r}: {absent}{close} ({listed}; your own are named FILE.py:NAME)"


def suggest_longer_names(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x' or 'y'?"`` for names that extend `name`, ignoring case and separators."""
    matches = _find_by_prefix(_split_name(name), known)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def suggest_same_family(name: str, known: Iterable[str]) -> str:
    """Return ``"; its family has 'x' and 'y'"`` for names with the same first two parts.

    Another number is another model, so these names are not suggestions.
    """
    matches = _find_by_prefix(_split_name(name)[:2], known)
    return f"; its family has {' and '.join(map(repr, matches))}" if matches else ""


def _find_same_size(name: str, known: Iterable[str]) -> str:
    """Return the only name with the same first two and last two parts, e.g. llama-3.1-8b for llama-3-8b."""
    parts = _split_name(name)
    matches = [other for other in known if len(parts) > 3 and _split_name(other)[:2] == parts[:2]
               and _split_name(other)[-2:] == parts[-2:]]
    matches = matches or _find_by_prefix(parts, known)  # 1b: gemma-3-1b
    return matches[0] if len(matches) == 1 else ""


def _find_nearest_size(name: str, known: Iterable[str]) -> str:
    """Return the name of the model with the nearest number of parameters; of several, the shortest name."""
    matches = [re.fullmatch(r"(?!tiny)(.*)-([\d.]+)b", other) for other in known]
    sizes = {match[0]: float(match[2]) for match in matches if match}  # in billions
    typed_size = re.search(r"(\d[\d.]*)([bm])(?![a-z])", name.lower())
    if typed_size:
        size = float(typed_size[1]) * (1 if typed_size[2] == "b" else 0.001)
    else:
        size = min(sizes.values())
    return min(sizes, key=lambda other: (abs(math.log(sizes[other] / size)), len(other)))


def _fix_by_skeleton(name: str, lines: Sequence[str]) -> Fix:
    """Return the command that writes a file with the user's own code, in the place of an unknown name."""
    word = re.sub(r"\W", "_", name)
    word = word if word.isidentifier() else f"my_{word}"
    file = choose_free_path(f"{word}.py")
    text = shlex.join(line.format(name=word) for line in lines)
    return Fix(words={name: f"{file}:{word}"}, before=(f"printf '%s\\n' {text} > {file}",))


def _find_by_prefix(parts: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the names whose first parts, or for a size such as 8b whose last parts, are `parts`."""
    parts_by_name = {name: _split_name(name) for name in known} if parts else {}
    matches = [name for name, own_parts in parts_by_name.items() if own_parts[:len(parts)] == parts]
    if not matches and parts[0].isdigit():
        matches = [name for name, own_parts in parts_by_name.items() if own_parts[-len(parts):] == parts]
    return matches[:MAX_PROPOSED]


def _split_name(name: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+", name.lower())


def load_built_in(what: str, place: str, extra: str) -> Any:
    """Import a built-in plug-in's MODULE:CLASS. `what`: kind and name, for messages; `place`: MODULE:CLASS;
    `extra`: extra of our package with the required libraries. Raises `UserError`: a library is not
    installed."""
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        raise UserError(f"{what}: needs {e.name}, which is not installed; "
                        f"{format_install_command(extra)}") from None


@dataclass(frozen=True)
class PluginRequest:
    """A serialisable request for a plug-in."""

    name: str
    """Name for built-in or registered code."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    """FILE.py:NAME or MODULE:NAME for a user's code; "": look up the name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 when the request was made."""


@dataclass(frozen=True)
class BuiltPlugin:
    """A plug-in built from a request."""

    value: Any
    """The plug-in, an instance of the requested class."""
    settings: Mapping[str, Any]
    """Constructor arguments."""
    files: Mapping[str, str] | None
    """File -> sha256; None: built-in code."""


def request_plugin(name: str, settings: Mapping[str, Any], built_in: BuiltIn,
                   own: Registry[type[Any]]) -> PluginRequest:
    """Create a request from a name or a reference to a user's code. Raises `UserError`: the name is unknown
    or taken, or the file fails."""
    if name in built_in:
        return PluginRequest(name, settings)
    if is_reference(name):
        plugin_name = own.load(name)
        code = own.code(plugin_name)
        assert code is not None, f"{name} was loaded and has no record"
        return PluginRequest(plugin_name, settings, code.reference, code.files)
    # fail early for unknown names; each process looks up the name again
    own.get(name)
    return PluginRequest(name, settings)


def build_plugin(request: PluginRequest, built_in: BuiltIn, own: Registry[type[Any]]) -> BuiltPlugin:
    """Build a plug-in from a request. Raises `UserError`: lists unknown settings, wrong types and broken
    rules (`problems()` of the class); or a file fails or has changed since the request."""
    plugin_class, files = _find_class(request, built_in, own)
    subject = f"{own.kind} {request.reference or request.name}"
    settings = parse_arguments(plugin_class, request.settings, subject)
    with report_plugin_errors(subject):
        value = plugin_class(**settings)
        problems = find_rule_problems(value)
    if problems:
        raise SettingsError(subject, problems)
    return BuiltPlugin(value, settings, files)


def _find_class(request: PluginRequest, built_in: BuiltIn, own: Registry[type[Any]],
                ) -> tuple[type[Any], Mapping[str, str] | None]:
    """Return a request's class and file hashes (None: built-in code)."""
    if request.name in built_in:
        module, name = built_in[request.name][:2]
        return getattr(importlib.import_module(module), name), None
    if request.reference:
        own.load(request.reference)
    plugin_class = own.get(request.name)
    code = own.code(request.name)
    files = code.files if code else {}
    # a process that starts later would execute other code under the same version
    changed = [name for name, digest in request.files.items() if files.get(name, digest) != digest]
    if changed:
        raise UserError(f"{own.kind} {request.reference}: {changed[0]} has changed since this command began; "
                        "run it again")
    return plugin_class, files
