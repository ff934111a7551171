"""Command-line options from a settings class: a field is an option or a positional argument, the field's type
declares accepted values, and the docstring under the field is the help text.

    @dataclass(frozen=True)
    class CountOptions:
        source: Annotated[Path, Flag("FILE")]
        \"\"\"Text to count.\"\"\"
        workers: Annotated[AtLeastOne, Flag(value="N")] = 1
        \"\"\"Processes that count.\"\"\"

    add_options(parser, CountOptions)                      # FILE [--workers N]
    options = read_options(CountOptions, parser.parse_args())
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from megatron_sov.base.command_line import Command, CommandParser, import_reference
from megatron_sov.base.errors import DryRun, ExitCode, check_only
from megatron_sov.base.outputs import check_place
from megatron_sov.base.settings.problem import UNSET, ProblemCode, SettingsError, SettingsProblem
from megatron_sov.base.settings.reading import find_rule_problems, get_field_hints, try_parse_settings
from megatron_sov.base.settings.sources import parse_value

MAX_FILES = 10_000
"""Maximum counted files in a folder: a file costs a request on a shared disk."""
NOTHING_DONE = "dry run: nothing was written, and nothing ran"
S = TypeVar("S")
_VALUES: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""Type -> value placeholder in help."""


def format_dry_run(read: Sequence[Path], written: Sequence[Path], changed: Sequence[tuple[str, Any]], *,
                   overwrite: bool) -> str:
    """Format a command's plan: input paths, output paths, and (option, value) of options that differ from
    their defaults; `overwrite`: whether existing outputs may be replaced."""
    rows = [("reads", f"{path}: {_format_path_size(path)}") for path in read]
    rows += [("writes", f"{path}: {_format_output_state(path, overwrite)}") for path in written]
    rows += [("with", f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
             for name, value in changed]
    lines = []
    for i, (word, text) in enumerate(rows):
        is_repeated = i > 0 and rows[i - 1][0] == word
        lines.append(f"  {'' if is_repeated else word:<8} {text}")
    return "\n".join([*lines, NOTHING_DONE])


def _format_path_size(path: Path) -> str:
    if not path.exists():  # `Flag.may_be_missing`
        return "does not exist yet"
    if not path.is_dir():
        return f"{path.stat().st_size:,} bytes"
    files = [file for file in itertools.islice(path.rglob("*"), MAX_FILES) if file.is_file()]
    more = " or more" if len(files) == MAX_FILES else ""
    return f"a folder of {len(files):,} files{more}, {sum(f.stat().st_size for f in files):,} bytes{more}"


def _format_output_state(path: Path, overwrite: bool) -> str:
    if not (path.exists() or path.is_symlink()):
        return "new"
    if overwrite:
        return "exists, and would be replaced"
    return "exists: the command continues it if possible, and refuses it otherwise"


@dataclasses.dataclass(frozen=True)
class Flag:
    """Command-line form of a field; without a `Flag`, the option is `--field-name`."""

    name: str = ""
    """`--heldout`, or a positional argument's name in help: `DIR`."""
    value: str = ""
    """Placeholder for the value in help, e.g. `SHARE`; "": chosen by type."""
    many: bool = False
    """Whether several values may follow the option."""
    rest: bool = False
    """Whether a positional argument takes all remaining words, options included."""
    alone: str | None = None
    """Value if no value follows the option; None: a value is required."""
    group: str = ""
    """Heading in help."""
    help: str = ""
    """Help for a type shared by several classes; otherwise the docstring under the field."""
    writes: bool = False
    """Whether the command writes the path; true for field names that begin with `out`."""
    may_be_missing: bool = False
    """Whether an input need not exist yet, because another job creates it."""


def count_cores() -> int:
    """Return the usable cores: the CPU affinity, limited by cgroup quotas."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
        quotas = iter_core_quotas(groups, Path("/sys/fs/cgroup"))
        cores = min([cores, *(max(1, int(quota)) for quota in quotas)])
    return cores


def iter_core_quotas(groups: str, root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of a process's control groups and their parents, by the content of
    /proc/PID/cgroup and the mount point `root`."""
    for line in filter(None, groups.split("\n")):
        _, controllers, group = line.split(":", 2)
        # cgroup v2 has one tree for all controllers, v1 one tree per controller
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, files = root, ["cpu.max"]
        if controllers:
            top, files = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        folder = top / group.lstrip("/")
        for parent in (folder, *folder.parents):
            # missing in a container, which sees the container's group as the root
            with contextlib.suppress(OSError, ValueError):
                if parent.is_relative_to(top):
                    numbers = " ".join((parent / name).read_text() for name in files)
                    quota, period = map(float, numbers.split())
                    if quota > 0:  # without a quota: -1 (v1) or "max" (v2, not a number)
                        yield quota / period


NO_FLAG = Flag("-")
"""Marks a field that the command line does not set."""
DRY_RUN = "--dry-run"


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field with command-line properties."""

    path: tuple[str, ...]
    """Field names from the outermost settings to the field."""
    flag: Flag
    hint: Any
    """Type without bounds, None and tuple."""
    repeats: bool
    """Whether the field is a tuple."""
    default: Any
    """`dataclasses.MISSING`: no default, or a default factory."""
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


@dataclasses.dataclass(frozen=True)
class DeclaredCommand:
    """A command in two parts: options with checks, and a function in another module that runs the command.
    Help and refused input never import torch.

    `Command.module` names an instance as `module:NAME`.
    """

    options: type
    """Settings class; its docstring is the command's description."""
    check: Callable[[Any], Any] | str = lambda options: options
    """Receives the options and runs the checks that need no torch. Returns the argument for `run_function`,
    or an exit code if no work remains. A text `module:function` is imported after parsing."""
    run_function: str | Mapping[type, str] = ""
    """`module:function`, or class of `check`'s result -> `module:function`, imported after the checks. It
    returns an exit code, or None for 0. "": `check` does the whole work, and returns that."""
    runs_in_checks: bool = False
    """Whether checks include the function, up to `stop_check`: it has no heavy import."""
    proposal_function: str = ""
    """`module:function` with checks of file contents that take seconds, for dry runs and proposed lines;
    receives the options."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_options(parser, self.options)

    def run(self, typed: argparse.Namespace) -> int:
        options: Any = read_options(self.options, typed)
        if hasattr(typed, "dry_run") and _has_derived_dry_run(self.options):
            with check_only():
                self.run_checks(options)
            raise DryRun(_describe_paths(options, typed))
        return self.run_options(options)

    def run_checks(self, options: Any) -> None:
        """Run the checks before the first write, started process or import of torch (`stop_check`)."""
        runs_function = self.runs_in_checks or not self.run_function
        if not runs_function:
            self.check_options(options)
        if self.proposal_function:  # may import torch, which a fault found by `check` does not need
            import_reference(self.proposal_function)(options)
        if runs_function:
            self.run_options(set_dry_run(options))

    def check_options(self, options: Any) -> Any:
        """Check that the outputs can be created, and return the result of `check`."""
        for option, paths in _iter_paths(options):
            for path in paths if option.is_written else ():
                check_place(option.key, path, is_file=bool(re.search(r"FILE|\.", _choose_metavar(option))))
        return (import_reference(self.check) if isinstance(self.check, str) else self.check)(options)

    def run_options(self, options: Any) -> int:
        """Run the command with an instance of `options` and return the exit code."""
        request = self.check_options(options)
        if isinstance(request, int) or not self.run_function:
            return request or ExitCode.OK
        function = self.run_function
        reference = function if isinstance(function, str) else function[type(request)]
        return import_reference(reference)(request) or ExitCode.OK


def set_dry_run(options: Any) -> Any:
    """Return the options with --dry-run, if the command takes it with them."""
    if not hasattr(options, "dry_run"):
        return options
    dry = dataclasses.replace(options, dry_run=True)
    return options if find_rule_problems(dry) else dry


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Declare the fields of a frozen dataclass and of nested settings classes, except `NO_FLAG`, as parser
    arguments, and the class docstring as the description."""
    if parser.description is None:
        parser.description = inspect.cleandoc(cls.__doc__ or "")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(options_class=cls)
    groups: dict[str, Any] = {"": parser}
    classes = cls.__mro__
    # field -> distance of the declaring class in the MRO; nearer classes overwrite
    nearness = {name: i for i in reversed(range(len(classes)))
                for name in inspect.get_annotations(classes[i])}
    # the class's own options precede inherited options; positional arguments keep their order
    for option in sorted(_iter_options(cls), key=lambda item: -1 if item.is_positional
                         else nearness[item.path[0]]):
        heading = option.flag.group
        into = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        help_text = option.help + _format_default(option)
        # booleans take no value: the option inverts the default
        if option.hint is bool:
            action = into.add_argument(option.key, dest=option.dest, help=help_text,
                                       default=argparse.SUPPRESS,
                                       action="store_false" if option.default is True else "store_true")
        else:
            action = into.add_argument(*([] if option.is_positional else [option.key]), dest=option.dest,
                                       help=help_text, metavar=_choose_metavar(option),
                                       **_choose_arity(option))
            # choices for shell completion; `read_options` checks them
            action.choices = tuple(map(str, get_args(option.hint))) or None
        # `Parser._check_value` leaves values to `read_options`, which reports all mistakes at once
        action.is_setting = True
        # argparse requires REMAINDER, and would name it next to a missing argument
        if option.flag.rest:
            action.required = False
        action.declared = None if option.default is dataclasses.MISSING else option.default
    if _has_derived_dry_run(cls):
        parser.add_argument(DRY_RUN, action="store_true", default=argparse.SUPPRESS,
                            help="Print inputs and outputs, and do nothing")


def _has_derived_dry_run(cls: Any) -> bool:
    """Return whether `--dry-run` derives from the options: the command writes and declares no `--dry-run`."""
    fields = list(_iter_options(cls))
    return any(option.is_written for option in fields) and not any(option.key == DRY_RUN for option in fields)


def _choose_arity(option: _Option) -> dict[str, Any]:
    if option.flag.rest:
        return {"nargs": argparse.REMAINDER, "default": argparse.SUPPRESS}
    if option.is_positional:
        if option.repeats:
            return {"nargs": "+" if option.is_required else "*", "default": argparse.SUPPRESS}
        return {} if option.is_required else {"nargs": "?", "default": argparse.SUPPRESS}
    if option.flag.alone is not None:
        return {"nargs": "?", "const": option.flag.alone, "default": argparse.SUPPRESS}
    many = {"nargs": "+", "action": "extend"} if option.flag.many else {"action": "append"}
    # append and extend would add to a default
    return {"required": option.is_required, "default": argparse.SUPPRESS, **(many if option.repeats else {})}


def _choose_metavar(option: _Option) -> str:
    if option.is_positional:
        return option.flag.value or option.flag.name
    if option.flag.value:
        return option.flag.value
    if get_origin(option.hint) is Literal:
        return f"{{{','.join(map(str, get_args(option.hint)))}}}"
    return _VALUES.get(option.hint, "VALUE")


def _format_default(option: _Option) -> str:
    default = option.default
    if default in (dataclasses.MISSING, None, "", ()) or option.hint is bool or "default" in option.help:
        return ""
    if isinstance(default, float):
        return f" (default {default:g})"
    words = default if isinstance(default, tuple) else (default,)
    return f" (default {' '.join(map(str, words))})".replace("%", "%%")


def read_options(cls: type[S], args: argparse.Namespace) -> S:
    """Build the settings class passed to `add_options` from parsed arguments. Raises `SettingsError`: all
    problems, under the options' names."""
    raw: dict[str, Any] = {}
    problems: list[SettingsProblem] = []
    names: dict[str, str] = {}
    for option in _iter_options(cls):
        names[option.dest] = option.key
        # SUPPRESS: an option that was not typed has no attribute, so the class's default applies
        if not hasattr(args, option.dest):
            continue
        node = raw
        for part in option.path[:-1]:
            node = node.setdefault(part, {})
        value = getattr(args, option.dest)
        if option.hint is Path and "" in (value if option.repeats else [value]):
            problems.append(SettingsProblem(ProblemCode.TYPE, option.dest,
                                            "is empty, where a file or folder is to be named"))
        convert = partial(_parse_typed, hint=option.hint)
        node[option.path[-1]] = list(map(convert, value)) if option.repeats else convert(value)
    invalid_texts: dict[str, str] = {}
    # JSON cannot hold invalid UTF-8: replace invalid texts by placeholders and restore the texts afterwards
    settings, further_problems = try_parse_settings(
        cls, _map_texts(raw, lambda text: _replace_bytes(text, invalid_texts)))
    if invalid_texts:
        settings = _map_texts(settings, lambda text: invalid_texts.get(text, text))
    problems += further_problems
    if settings is not None and not problems:
        problems = find_rule_problems(settings)
    if problems:
        raise SettingsError("", [_use_option_name(problem, names) for problem in problems])
    return cast(S, settings)


def _iter_paths(settings: Any) -> Iterator[tuple[_Option, list[Path]]]:
    for option in _iter_options(type(settings)):
        value = operator.attrgetter(option.dest)(settings)
        if option.hint is Path:
            yield option, [path for path in (value if option.repeats else [value]) if path is not None]


def _describe_paths(settings: Any, args: argparse.Namespace) -> str:
    """Return the plan of a dry run. Raises `SettingsError`: input paths do not exist."""
    inputs: list[Path] = []
    outputs: list[Path] = []
    changed: list[tuple[str, Any]] = []
    problems: list[SettingsProblem] = []
    for option, paths in _iter_paths(settings):
        if option.is_written:
            outputs += paths
        else:
            inputs += paths
            problems += [SettingsProblem(ProblemCode.FILE, option.key, "does not exist", path,
                                         "check the path")
                         for path in paths if not (option.flag.may_be_missing or path.exists())]
    if problems:
        raise SettingsError("", problems)
    for option in _iter_options(type(settings)):
        if option.hint is not Path and hasattr(args, option.dest):
            value = operator.attrgetter(option.dest)(settings)
            changed.append((option.key, "" if option.hint is bool else value))
    return format_dry_run(inputs, outputs, changed, overwrite=bool(getattr(settings, "overwrite", False)))


@dataclasses.dataclass(frozen=True)
class ActionGroup:
    """A command whose first argument is an action, e.g. `convert to-hf`."""

    actions: Mapping[str, DeclaredCommand | Command]
    """Action name -> command; a `Command` for a part of the package that may not be installed."""
    description: str = ""
    """Description in `--help`; "": the command's help line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the actions; the first paragraph in a settings class's docstring is the action's help."""
        parser.description = self.description or parser.description
        below = parser.add_subparsers(dest="action", required=True, metavar="ACTION",
                                      parser_class=CommandParser)
        for name, action in self.actions.items():
            if isinstance(action, Command):
                action.declare(name, below)
                continue
            summary = " ".join(inspect.cleandoc(action.options.__doc__ or "").split("\n\n")[0].split())
            action.add_arguments(below.add_parser(name, help=summary.removesuffix(".").replace("%", "%%")))

    def load_action(self, typed: argparse.Namespace) -> DeclaredCommand:
        action = self.actions[typed.action]
        return action.load() if isinstance(action, Command) else action

    def run(self, typed: argparse.Namespace) -> int:
        return self.load_action(typed).run(typed)


def read_command_options(args: argparse.Namespace) -> Any:
    """Return the typed options as an instance of the command's settings class; see `read_options`."""
    return read_options(args.options_class, args) if hasattr(args, "options_class") else args


def _replace_bytes(text: str, originals: dict[str, str]) -> str:
    """Replace a text with invalid UTF-8 (a file name) by a placeholder, recorded in `originals`."""
    if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    originals[placeholder := f"\ue000{len(originals)}\ue001"] = text
    return placeholder


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to the texts and paths inside a value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Path):
        return Path(change(str(value)))
    if isinstance(value, dict):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_texts(inner, change) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{field.name: _map_texts(getattr(value, field.name), change)
                                             for field in dataclasses.fields(value) if field.init})
    return value


def _parse_typed(text: Any, hint: Any) -> Any:
    """Convert a typed argument to a plain value of the field's type; return the text on failure."""
    if not isinstance(text, str) or hint in (str, Path):
        return text
    if get_origin(hint) is Literal:
        return next((word for word in get_args(hint) if str(word) == text), text)
    # try an exact integer first: 2**60 + 1 would change as a float
    with contextlib.suppress(ValueError):
        if hint in (int, float):
            return int(text)
    with contextlib.suppress(ValueError):
        if hint is float:
            return float(text)
    try:
        value = parse_value(text)  # 2e9 is an integer
    except (ValueError, RecursionError):
        return text
    # on a command line, null and true are text
    return value if hint not in (int, float) or isinstance(value, (int, float)) else text


def _use_option_name(problem: SettingsProblem, names: Mapping[str, str]) -> SettingsProblem:
    """Replace fields by options in a problem; drop the value of a switch, which is not typed."""
    key = problem.key
    while key and key not in names:
        # a problem of a list item or nested field belongs to the option that sets the whole
        key = key.rpartition(".")[0]
    value = UNSET if isinstance(problem.value, bool) else problem.value
    parent = problem.key.rpartition(".")[0]
    other_key = f"{parent}.{problem.other}" if parent else problem.other
    return dataclasses.replace(problem, key=names.get(key, problem.key), value=value,
                               other=names.get(other_key, problem.other))


def _iter_options(cls: Any, above: tuple[str, ...] = ()) -> Iterator[_Option]:
    """Yield a settings class's options, including nested settings classes."""
    hints, docs = get_field_hints(cls), get_field_help(cls)
    for field in dataclasses.fields(cls):
        flag, hint, repeats = _unwrap_hint(hints[field.name])
        if flag.name == "-" or not field.init:
            continue
        path = (*above, field.name)
        has_factory = field.default_factory is not dataclasses.MISSING
        if dataclasses.is_dataclass(hint):
            # options show the nested class's own defaults; another factory's defaults would be lost silently
            if has_factory and cast(Any, field.default_factory) is not hint:
                raise TypeError(f"{cls.__name__}.{field.name}: the defaults are those of {hint}")
            yield from _iter_options(hint, path)
            continue
        yield _Option(path, flag, hint=hint, repeats=repeats, default=field.default,
                      is_required=field.default is dataclasses.MISSING and not has_factory,
                      help=docs.get(field.name) or _format_help(flag.help))


def _unwrap_hint(hint: Any) -> tuple[Flag, Any, bool]:
    """Return a type's `Flag`, the type without bounds, None and tuple, and whether the type was a tuple."""
    flag, repeats = Flag(), False
    while True:
        if get_origin(hint) is Annotated:
            if flag == Flag():
                flag = next((part for part in hint.__metadata__ if isinstance(part, Flag)), flag)
            hint = get_args(hint)[0]
        elif get_origin(hint) in (Union, UnionType):
            hint = next(part for part in get_args(hint) if part is not NoneType)
        elif get_origin(hint) is tuple:
            hint, repeats = get_args(hint)[0], True
        else:
            return flag, hint, repeats


@cache
def _parse_docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return class -> field -> docstring under the field, parsed from a module's source."""
    # Python does not keep docstrings under fields at run time
    source = inspect.getsource(sys.modules[module])
    docs_by_class: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs = docs_by_class[node.name] = {}
        for field, text in itertools.pairwise(node.body):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)):
                docs[field.target.id] = " ".join(inspect.cleandoc(text.value.value).split())
    return docs_by_class


def get_field_docstrings(cls: type) -> dict[str, str]:
    """Return field -> docstring, including inherited fields."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _parse_docstrings(base.__module__)[base.__name__]
    return texts


def get_field_help(cls: type) -> dict[str, str]:
    """Return field -> help text for argparse."""
    return {name: _format_help(text) for name, text in get_field_docstrings(cls).items()}


def _format_help(text: str) -> str:
    """Remove the full stop and escape "%" for argparse."""
    return text.removesuffix(".").replace("%", "%%")
