"""Options of a command from a class of settings: each field is an option or a positional argument, its type
says what is taken, and the string under it in the source is its help.

    @dataclass(frozen=True)
    class CountOptions:
        source: Annotated[Path, Flag("FILE")]
        \"\"\"Text to count.\"\"\"
        workers: Annotated[AtLeastOne, Flag(value="N")] = 1
        \"\"\"Processes that count.\"\"\"

    add_options(parser, CountOptions)                      # FILE [--workers N]
    options = read_options(CountOptions, parser.parse_args())
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from megatron_sov.base.command_line import Command, CommandParser
from megatron_sov.base.errors import DryRun
from megatron_sov.base.settings.problem import UNSET, ProblemCode, SettingsError, SettingsProblem
from megatron_sov.base.settings.reading import find_problems, hints_of, rules_of
from megatron_sov.base.settings.sources import parse_value

MAX_FILES = 10_000
"""Of a folder that are counted; on a shared disk each costs a question."""
NOTHING_DONE = "dry run: options and paths were checked, not --set nor files; nothing was written or run"
S = TypeVar("S")
_VALUES: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""Type -> what help calls a value of it."""


# `--dry-run` of a command that writes: what it would read and write, from its options alone.


def describe(read: Sequence[Path], written: Sequence[Path], said: Sequence[tuple[str, Any]], *,
             overwrite: bool) -> str:
    """Return what a command would do.

    Args:
        read: files and folders that exist.
        written: what it makes.
        said: options that differ from their defaults, with their values.
        overwrite: whether what is there may be replaced.
    """
    rows = [("reads", f"{path}: {_size(path)}") for path in read]
    rows += [("writes", f"{path}: {_fate(path, overwrite)}") for path in written]
    rows += [("with", f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
             for name, value in said]
    lines = [f"  {'' if i and rows[i - 1][0] == word else word:<8} {text}"
             for i, (word, text) in enumerate(rows)]
    return "\n".join([*lines, NOTHING_DONE])


def _size(path: Path) -> str:
    if not path.is_dir():
        return f"{path.stat().st_size:,} bytes"
    files = [file for file in itertools.islice(path.rglob("*"), MAX_FILES) if file.is_file()]
    more = " or more" if len(files) == MAX_FILES else ""
    return f"a folder of {len(files):,} files{more}, {sum(f.stat().st_size for f in files):,} bytes{more}"


def _fate(path: Path, overwrite: bool) -> str:
    if not (path.exists() or path.is_symlink()):
        return "new"
    return "is there, and would be replaced" if overwrite else \
        "is there: the command goes on with it where it can, else refuses it"


@dataclasses.dataclass(frozen=True)
class Flag:
    """How a field is given; without one it is `--its-name`."""

    name: str = ""
    """As it is typed: `--heldout`, or, without dashes, what help calls a positional argument: `DIR`."""
    value: str = ""
    """What help calls the value, e.g. `SHARE`; "": by the type."""
    many: bool = False
    """Whether several values may follow at once."""
    alone: str | None = None
    """What the option stands for where no value follows it; None: one must."""
    group: str = ""
    """Heading under which help lists it."""
    help: str = ""
    """Of a type that several classes have; else the string under the field is."""
    writes: bool = False
    """Whether the path is one that the command makes; what begins with `out` always is."""


def num_cores() -> int:
    """Return the cores that this process may use: those of its affinity, and no more than a quota of its
    control groups gives."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
        cores = min([cores, *(max(1, int(quota)) for quota in core_quotas(groups, Path("/sys/fs/cgroup")))])
    return cores


def core_quotas(groups: str, root: Path) -> Iterator[float]:
    """Return the quotas of cores that some control groups and those above them have.

    Args:
        groups: lines of /proc/PID/cgroup.
        root: where the kernel shows control groups.
    """
    for line in filter(None, groups.split("\n")):
        _, controllers, group = line.split(":", 2)
        # one tree of all controllers, or one for each
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, files = (root / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")) if controllers else (
            root, ("cpu.max",))
        folder = top / group.lstrip("/")
        for each in (folder, *folder.parents):
            # not there: a container sees its own group as the root
            with contextlib.suppress(OSError, ValueError):
                if each.is_relative_to(top):
                    quota, period = map(float, " ".join((each / name).read_text() for name in files).split())
                    if quota > 0:  # -1, and "max", which is no number: without a quota
                        yield quota / period


NO_FLAG = Flag("-")
"""Of a field that the command line does not set."""
DRY_RUN = "--dry-run"


@dataclasses.dataclass(frozen=True)
class _Given:
    """A field as the command line has it."""

    path: tuple[str, ...]
    """Names of the fields that lead to it, through settings inside settings."""
    flag: Flag
    hint: Any
    """Its type without bounds, None and tuple around it."""
    repeats: bool
    """Whether it is a tuple."""
    default: Any
    """`dataclasses.MISSING`: it has none, or one that is made."""
    is_required: bool
    help: str

    @property
    def is_positional(self) -> bool:
        return bool(self.flag.name) and not self.flag.name.startswith("-")

    @property
    def is_written(self) -> bool:
        return self.hint is Path and (self.flag.writes or self.path[-1].startswith("out"))

    @property
    def key(self) -> str:
        if self.flag.name:
            return self.flag.name
        return f"--{'no-' if self.default is True else ''}{self.path[-1].replace('_', '-')}"

    @property
    def dest(self) -> str:
        return ".".join(self.path)


def command_of(cls: type, run: Callable[[argparse.Namespace], int]) -> SimpleNamespace:
    """Return a command with the options of a class, for a file that holds several (`Command.module`)."""
    return SimpleNamespace(add_arguments=partial(add_options, cls=cls), run=run)


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Declare the fields of a class of settings as a parser's arguments, and what the class says as its
    description, where it has none.

    Args:
        parser: takes them; a value is checked by `read_options`, not by the parser.
        cls: a frozen dataclass; fields of classes of settings inside it are arguments too, unless `NO_FLAG`.
    """
    if parser.description is None:
        parser.description = inspect.cleandoc(cls.__doc__ or "")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(options_class=cls)
    groups: dict[str, Any] = {"": parser}
    classes = cls.__mro__
    # field -> how far up the class that declares it is; nearer ones overwrite
    nearness = {name: i for i in reversed(range(len(classes)))
                for name in inspect.get_annotations(classes[i])}
    # options of the class itself go before those that it has from others; arguments keep their order
    for given in sorted(_fields(cls), key=lambda one: -1 if one.is_positional else nearness[one.path[0]]):
        heading = given.flag.group
        into = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        shown = given.help + _default_shown(given)
        # no value on the line: the option turns the default around
        if given.hint is bool:
            action = into.add_argument(given.key, dest=given.dest, help=shown, default=argparse.SUPPRESS,
                                       action="store_false" if given.default is True else "store_true")
        else:
            action = into.add_argument(*([] if given.is_positional else [given.key]), dest=given.dest,
                                       help=shown, metavar=_metavar(given), **_arity(given))
            # a shell completes these; `read_options` checks them
            action.choices = tuple(map(str, get_args(given.hint))) or None
        # `Parser._check_value` leaves such values to `read_options`, which names all mistakes at once
        action.is_setting = True
        action.declared = None if given.default is dataclasses.MISSING else given.default
    if _tells_by_itself(cls):
        parser.add_argument(DRY_RUN, action="store_true", default=argparse.SUPPRESS,
                            help="Say what would be read and written, and do nothing")


def _tells_by_itself(cls: Any) -> bool:
    """Say whether a command's `--dry-run` is told from its options: it writes, and has none of its own."""
    fields = list(_fields(cls))
    return any(given.is_written for given in fields) and not any(given.key == DRY_RUN for given in fields)


def _arity(given: _Given) -> dict[str, Any]:
    if given.is_positional:
        if given.repeats:
            return {"nargs": "+" if given.is_required else "*", "default": argparse.SUPPRESS}
        return {} if given.is_required else {"nargs": "?", "default": argparse.SUPPRESS}
    if given.flag.alone is not None:
        return {"nargs": "?", "const": given.flag.alone, "default": argparse.SUPPRESS}
    many = {"nargs": "+", "action": "extend"} if given.flag.many else {"action": "append"}
    # both would add to a default
    return {"required": given.is_required, "default": argparse.SUPPRESS, **(many if given.repeats else {})}


def _metavar(given: _Given) -> str:
    if given.is_positional:
        return given.flag.value or given.flag.name
    words = get_args(given.hint) if get_origin(given.hint) is Literal else ()
    return given.flag.value or (f"{{{','.join(map(str, words))}}}" if words else
                                _VALUES.get(given.hint, "VALUE"))


def _default_shown(given: _Given) -> str:
    default = given.default
    if default in (dataclasses.MISSING, None, "", ()) or given.hint is bool or "default" in given.help:
        return ""
    if isinstance(default, float):
        return f" (default {default:g})"
    words = default if isinstance(default, tuple) else (default,)
    return f" (default {' '.join(map(str, words))})".replace("%", "%%")


def read_options(cls: type[S], args: argparse.Namespace) -> S:
    """Return a class of settings with what was typed.

    Args:
        cls: as `add_options` had it.
        args: what its parser gave.

    Raises:
        SettingsError: all that is wrong with them, under the names that are typed.
    """
    raw: dict[str, Any] = {}
    problems: list[SettingsProblem] = []
    names: dict[str, str] = {}
    for given in _fields(cls):
        names[given.dest] = given.key
        # SUPPRESS: what was not typed is absent, so that defaults are those of the class
        if not hasattr(args, given.dest):
            continue
        node = raw
        for part in given.path[:-1]:
            node = node.setdefault(part, {})
        value = getattr(args, given.dest)
        if given.hint is Path and "" in (value if given.repeats else [value]):
            problems.append(SettingsProblem(ProblemCode.TYPE, given.dest,
                                            "is empty, where a file or folder is to be named"))
        node[given.path[-1]] = [_typed(text, given.hint) for text in value] if given.repeats else \
            _typed(value, given.hint)
    kept: dict[str, str] = {}
    # texts that are no UTF-8 go through JSON as placeholders, and come back after it
    settings, found = find_problems(cls, _each_text(raw, lambda text: _replace_bytes(text, kept)))
    settings = _each_text(settings, lambda text: kept.get(text, text)) if kept else settings
    problems += found
    if settings is not None and not problems:
        problems = rules_of(settings)
    # last: a dry run still finds every mistake of the options
    if settings is not None and not problems and hasattr(args, "dry_run") and _tells_by_itself(cls):
        problems = _end_dry_run(settings, raw)
    if problems:
        raise SettingsError("", [_under_its_name(problem, names) for problem in problems])
    return cast(S, settings)


def _end_dry_run(settings: Any, raw: Mapping[str, Any]) -> list[SettingsProblem]:
    """Return which of the paths that are to be read do not exist.

    Raises:
        DryRun: all are there.
    """
    read: list[Path] = []
    written: list[Path] = []
    said: list[tuple[str, Any]] = []
    problems: list[SettingsProblem] = []
    for given in _fields(type(settings)):
        value = settings
        for name in given.path:
            value = getattr(value, name)
        paths = [path for path in (value if given.repeats else [value]) if isinstance(path, Path)]
        if given.is_written:
            written += paths
        elif given.hint is Path:
            read += paths
            problems += [SettingsProblem(ProblemCode.FILE, given.dest, "does not exist", path,
                                         "check the path")
                         for path in paths if not path.exists()]
        elif _is_in(raw, given.path):
            said.append((given.key, "" if given.hint is bool else value))
    if problems:
        return problems
    raise DryRun(describe(read, written, said, overwrite=bool(getattr(settings, "overwrite", False))))


def _is_in(raw: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(raw, dict) or name not in raw:
            return False
        raw = raw[name]
    return True


Actions = Mapping[str, tuple[type, Callable[[Any], int]] | Command]
"""Name of an action of a command -> its class of settings, and what takes that and returns an exit code; or
a command of another part, which may not be installed."""


def add_actions(parser: argparse.ArgumentParser, actions: Actions) -> None:
    """Declare the actions of a command; the first sentence that a class says is an action's line in help."""
    below = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=CommandParser)
    for name, action in actions.items():
        if isinstance(action, Command):
            action.declare(name, below)
            continue
        cls, _ = action
        says = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
        add_options(below.add_parser(name, help=says.removesuffix(".").replace("%", "%%")), cls)


def run_action(actions: Actions, args: argparse.Namespace) -> int:
    action = actions[args.action]
    if isinstance(action, Command):
        return int(action.load().run(args))
    cls, do = action
    return do(read_options(cls, args))


def options_of(args: argparse.Namespace) -> Any:
    """Return what was typed as the class of settings that the command has declared; see `read_options`."""
    return read_options(args.options_class, args) if hasattr(args, "options_class") else args


def _replace_bytes(text: str, kept: dict[str, str]) -> str:
    """Return a text, or what stands for it where it is none: a file's name may be bytes that are no UTF-8,
    which JSON cannot hold."""
    if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    kept[place := f"\ue000{len(kept)}\ue001"] = text
    return place


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its texts and paths changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Path):
        return Path(change(str(value)))
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each_text(inner, change) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{field.name: _each_text(getattr(value, field.name), change)
                                             for field in dataclasses.fields(value) if field.init})
    return value


def _typed(text: Any, hint: Any) -> Any:
    """Return the plain value of one that was typed; text where it is none of its type."""
    if not isinstance(text, str) or hint in (str, Path):
        return text
    if get_origin(hint) is Literal:
        return next((word for word in get_args(hint) if str(word) == text), text)
    # an exact whole number first: through a float 2**60 + 1 would change
    with contextlib.suppress(ValueError):
        if hint in (int, float):
            return int(text)
    with contextlib.suppress(ValueError):
        if hint is float:
            return float(text)
    try:
        value = parse_value(text)  # 2e9 is a whole number
    except (ValueError, RecursionError):
        return text
    # null and true are words on a command line
    return value if hint not in (int, float) or isinstance(value, (int, float)) else text


def _under_its_name(problem: SettingsProblem, names: Mapping[str, str]) -> SettingsProblem:
    """Return a problem with the option in place of the field; of several values the field's own counts, and
    what is on or off has none on the line."""
    key = problem.key
    while key and key not in names:
        # up to the field that the option sets: a problem may be of an item inside it
        key = key.rpartition(".")[0]
    value = UNSET if isinstance(problem.value, bool) else problem.value
    beside = problem.key.rpartition(".")[0]
    other = f"{beside}.{problem.other}" if beside else problem.other
    return dataclasses.replace(problem, key=names.get(key, problem.key), value=value,
                               other=names.get(other, problem.other))


def _fields(cls: Any, above: tuple[str, ...] = ()) -> Iterator[_Given]:
    """Yield what the command line has of a class of settings and of those inside it."""
    hints, docs = hints_of(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        flag, hint, repeats = _taken_apart(hints[field.name])
        if flag.name == "-" or not field.init:
            continue
        path = (*above, field.name)
        is_made = field.default_factory is not dataclasses.MISSING
        if dataclasses.is_dataclass(hint):
            # options are built from the class's own defaults; another factory's would be lost without a word
            if is_made and cast(Any, field.default_factory) is not hint:
                raise TypeError(f"{cls.__name__}.{field.name}: the defaults are those of {hint}")
            yield from _fields(hint, path)
            continue
        yield _Given(path, flag, hint, repeats, field.default,
                     field.default is dataclasses.MISSING and not is_made,
                     docs.get(field.name) or _as_help(flag.help))


def _taken_apart(hint: Any) -> tuple[Flag, Any, bool]:
    """Return a type's flag, the type itself without bounds, None and tuple, and whether there was a tuple."""
    flag, repeats = Flag(), False
    while True:
        if get_origin(hint) is Annotated:
            outer, flag = flag, next((part for part in hint.__metadata__ if isinstance(part, Flag)), flag)
            flag = flag if outer == Flag() else outer
            hint = get_args(hint)[0]
        elif get_origin(hint) in (Union, UnionType):
            hint = next(part for part in get_args(hint) if part is not NoneType)
        elif get_origin(hint) is tuple:
            hint, repeats = get_args(hint)[0], True
        else:
            return flag, hint, repeats


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Return class -> field -> the string under it, of a module's source."""
    # docstrings under fields are no attributes: the source is the only place that has them
    source = inspect.getsource(sys.modules[module])
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs = found[node.name] = {}
        for field, text in itertools.pairwise(node.body):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)):
                docs[field.target.id] = " ".join(inspect.cleandoc(text.value.value).split())
    return found


def field_texts(cls: type) -> dict[str, str]:
    """Return field -> the string under it in the source, of a class and of those that it is made from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            found |= _module_docs(each.__module__)[each.__name__]
    return found


def field_docs(cls: type) -> dict[str, str]:
    """Return field -> help, see `field_texts`."""
    return {name: _as_help(text) for name, text in field_texts(cls).items()}


def _as_help(text: str) -> str:
    """Return a sentence as help has it: no full stop."""
    return text.removesuffix(".").replace("%", "%%")
