"""Command-line parsers, and conversion of exceptions to messages and exit codes."""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_sov.base.errors import (
    DryRun, ExitCode, Fix, GateFailed, StopRequested, UserError, escape_controls, to_exit_code)
from megatron_sov.base.hints.commands import PROGRAMS, build_command_error, find_action
from megatron_sov.base.hints.lines import is_placeholder, propose_line
from megatron_sov.base.hints.missing import complete_line, find_text_option
from megatron_sov.base.hints.removed import check_command
from megatron_sov.base.hints.words import translate_options
from megatron_sov.version import __version__

MAX_PATH_CHARS = 300
"""Maximum characters of a path in a message; file systems allow paths longer than a screen."""


def format_version(program: str) -> str:
    return f"{program} {__version__}"


class HelpFormatter(argparse.HelpFormatter):
    """Wraps one-line texts and keeps the lines of multi-line texts."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.split("\n"))
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser that reports each mistake as a one-sentence `UserError` without the usage."""

    _typed: Sequence[str] = ()
    listing = ""
    """Command list under headings; "": use argparse's list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        # argparse would convert "" to the current folder
        self.register("type", Path, _parse_path)

    def format_help(self) -> str:
        if not self.listing:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section("options")
        formatter.add_arguments([a for a in self._actions if a.option_strings])
        formatter.end_section()
        return f"{formatter.format_help()}\n{self.listing}\n\n{self.prog} COMMAND --help shows examples.\n"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._typed = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a value against the choices, except settings, which `read_options` checks."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            typed = list(self._typed)
            if typed[0].startswith("-") and not find_action(self.prog, typed):
                path = next(filter(os.path.exists, typed), "")
                index = typed.index(path) if path else 0
                if index:
                    # without the option before the path: the command will take the path itself
                    others = [*typed[:index - 1], *typed[index + 1:]]
                    raise build_command_error(self.prog, path, list(action.choices), others)
                raise UserError(f"{self.prog}: an action comes before the options: "
                                f"{', '.join(action.choices)} (`{self.prog} ACTION --help` shows more)")
            start = 0 if typed[0].startswith("-") else typed.index(value)
            raise build_command_error(self.prog, typed[start], list(action.choices), typed[start + 1:])
        if not getattr(action, "is_setting", False):
            super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        if "are required: " in message and "--resume" in self._typed:
            message += "; `megatron-sov resume RUN` goes on without them"
        elif "are required: " in message and not self.listing:
            names = message.partition("are required: ")[2]
            choices, line = complete_line(self, self._typed, names)
            raise UserError(f"{self.prog}: {message}{choices}", Fix(line))
        raise UserError(f"{self.prog}: {message} (--help lists what it takes)")

    def parse_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                   namespace: Any = None) -> argparse.Namespace:
        """Parse the command line. Raises `UserError`: the first mistake, with the corrected line; it names
        all unknown words (`translate_options`)."""
        words = self._update_words(list(sys.argv[1:] if args is None else args))
        parsed, unknown = self.parse_known_args(words, namespace)
        if not unknown:
            return parsed
        known = [word for word in self._typed if word not in unknown]
        if len(unknown) == 1 and (option := find_text_option(self, unknown[0], self._typed)):
            raise UserError(f"{self.prog}: {unknown[0]}: takes an option before it, {option}",
                            Fix(f"{self.prog} {shlex.join([*known, option, unknown[0]])}"))
        paths = list(filter(os.path.exists, known))
        if paths and all(map(os.path.exists, unknown)):
            lines = []
            for path in (paths[0], *unknown):
                words = [path if word == paths[0] else word for word in known]
                lines.append(f"{self.prog} {shlex.join(words)}")
            raise UserError(f"{self.prog}: takes {paths[0]} or {unknown[0]}, one at a time",
                            Fix("\n  ".join(lines)))
        if not Counter(unknown) - Counter(self._typed):
            remaining = list(self._typed)
            for word in reversed(unknown):  # remove its last occurrence
                del remaining[len(remaining) - 1 - remaining[::-1].index(word)]
            raise UserError(f"{self.prog}: {shlex.join(unknown)}: nothing takes this; leave it out",
                            Fix(f"{self.prog} {shlex.join(remaining)}".rstrip()))
        self.error(f"{shlex.join(unknown)}: nothing takes this")

    def _update_words(self, typed: Sequence[str]) -> Sequence[str]:
        """Replace outdated words; a program or group of commands leaves them to the command's parser."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return typed
        return translate_options(self, typed)


def check_arguments(parsed: argparse.Namespace, command: Any) -> None:
    """Run a command's checks with parsed arguments, until its first write or long work (`stop_check`).
    Raises `UserError`: a fault of a value that is no placeholder."""
    # not at the top: `base.settings` imports this module
    from megatron_sov.base.settings import (
        ActionGroup, DeclaredCommand, SettingsError, read_options, set_dry_run)

    try:
        options_class = getattr(parsed, "options_class", None)
        if options_class is None:
            return
        options = read_options(options_class, parsed)
        action = command.load_action(parsed) if isinstance(command, ActionGroup) else command
        if isinstance(action, DeclaredCommand):
            action.run_checks(options)
        else:  # `submit`, up to its first write
            parsed.dry_run = set_dry_run(options).dry_run
            command.run(parsed)
    except SettingsError as e:
        problems = [problem for problem in e.problems if not is_placeholder(str(problem.value))]
        if problems:
            raise SettingsError(e.where, problems) from None


def find_check(program: str) -> Callable[[list[str]], object] | None:
    """Return the function that parses command lines for a program; None: not in `PROGRAMS`."""
    if program not in PROGRAMS:
        return None
    module = importlib.import_module(PROGRAMS[program])
    return partial(_check_line, module.build_parser(), module.COMMANDS)


def _check_line(parser: Parser, commands: "Mapping[str, Command]", line: list[str]) -> None:
    """Check a command line of `sov-data` or `sov-tokenizer`."""
    check_command(parser.prog, line)
    parsed = parser.parse_args(line)
    name = " ".join(line[:2])  # rl run, eval difference
    check_arguments(parsed, commands[name if name in commands else parsed.command].load())


def _parse_path(text: str) -> Path:
    """Convert a word to a path; an empty word, e.g. of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, where a file or folder is to be named")
    return Path(text)


@dataclass(frozen=True)
class Command:
    """A command: module, and line in `--help`."""

    module: str
    """Dotted path to a module with `add_arguments(parser)` and `run(args) -> exit code`, or `module:NAME` for
    an object with both functions."""
    help: str
    """Line in `--help`."""
    group: str = ""
    """Heading in the program's help."""
    page: str = ""
    """Page path below docs/."""
    examples: tuple[str, ...] = ()
    """Example command lines for `--help`, without the program's name."""

    def format_help_ending(self, program: str, words: str = "") -> str:
        """Format the examples that begin with `words`, and the page, for the end of `--help`."""
        begin = f"{words} ".lstrip()
        lines = [f"  {program} {line}" for line in self.examples if f"{line} ".startswith(begin)]
        page = [f"page: docs/{self.page}"] if self.page else []
        return "\n".join([*(["examples:"] if lines else []), *lines, *page])

    def declare(self, name: str, below: Any) -> None:
        """Add the command to `add_subparsers(parser_class=CommandParser)`."""
        # store the module's name until the command is parsed: `--help` imports no command
        child = below.add_parser(name, help=self.help.replace("%", "%%"))
        child._module, child._command = self.module, self

    def load(self) -> Any:
        return import_reference(self.module)


def read_commands(file: Path) -> dict[str, Command]:
    """Read a program's commands from JSON: name -> fields of `Command`, in the order of the help."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {name: Command(**row | {"examples": tuple(row["examples"])}) for name, row in rows.items()}


def import_reference(reference: str) -> Any:
    """Import `module` or `module:NAME` and return the module or the object."""
    # not `pkgutil.resolve_name`: for a missing module it reports a missing attribute of the package
    module, _, name = reference.partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, name) if name else imported


class CommandParser(Parser):
    """A command's parser; imports the command's module at the first parse."""

    _module = ""
    _command: Command | None = None

    def import_command(self) -> None:
        """Import the command's module and add the arguments, once."""
        # emptied first: a second call would declare every option twice
        module, self._module = self._module, ""
        if module:
            import_reference(module).add_arguments(self)
            if self._command is not None:
                append_examples(self, self._command, self.prog.split()[0])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.import_command()
        return super().parse_known_args(args if args is None else self._update_words(args), namespace)


def append_examples(parser: argparse.ArgumentParser, command: Command, program: str) -> None:
    """Append examples and page to `--help` for a command and its actions."""
    if isinstance(parser, CommandParser) and parser._module and parser._command is not None:
        # not imported yet: `import_command` appends its own examples and page, or the enclosing command's
        parser._command = dataclasses.replace(parser._command, page=parser._command.page or command.page,
                                              examples=parser._command.examples or command.examples)
        return
    words = parser.prog.removeprefix(program).strip()
    epilog = textwrap.fill(" ".join((parser.epilog or "").split()), 100)
    parser.epilog = "\n\n".join(filter(None, (epilog, command.format_help_ending(program, words)))) or None
    parser.formatter_class = HelpFormatter
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                append_examples(child, command, program)


def format_command_list(commands: Mapping[str, str], groups: Mapping[str, str]) -> str:
    """Format a line per command (name -> help), under group headings (name -> heading) in their order; other
    commands come last."""
    width = max(map(len, commands), default=0)
    lines = []
    for heading in dict.fromkeys([*groups.values(), ""]):
        rows = [f"  {name:<{width}}  {text}" for name, text in commands.items()
                if groups.get(name, "") == heading]
        if rows:
            lines += [f"{heading or 'commands'}:", *rows, ""]
    return "\n".join(lines).rstrip()


def build_program_parser(program: str, description: str, commands: Mapping[str, Command]) -> Parser:
    """Build a program's parser; parsing a command's arguments imports the command."""
    parser = Parser(prog=program, description=description)
    parser.listing = format_command_list({name: c.help for name, c in commands.items()},
                                         {name: c.group for name, c in commands.items()})
    parser.add_argument("--version", action="version", version=format_version(program))
    actions = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                    parser_class=CommandParser)
    for name, command in commands.items():
        command.declare(name, actions)
    return parser


def run_program(parser: Parser, commands: Mapping[str, Command], argv: Sequence[str] | None) -> int:
    def action() -> int:
        typed = order_help(list(sys.argv[1:] if argv is None else argv))
        try:
            check_command(parser.prog, typed)
            args = parser.parse_args(typed)
            return int(commands[args.command].load().run(args))
        except UserError as e:
            check = partial(_check_line, parser, commands)
            raise propose_line(parser.prog, typed, e, check, find_check) from None

    return run_to_exit_code(action)


def order_help(typed: list[str]) -> list[str]:
    """Return `help COMMAND`, `--help COMMAND` or `COMMAND help` as `COMMAND --help`."""
    if typed[:1] and typed[0] in ("help", "-h", "--help"):
        return [*typed[1:], "--help"]
    return [*typed[:-1], "--help"] if typed[-1:] == ["help"] and len(typed) in (2, 3) else typed


OMP_WAIT_POLICY = "OMP_WAIT_POLICY"
"""OpenMP variable. Threads that spin while waiting take cores from working threads of other programs
(measured: 14 times slower with three programs per core)."""


def run_to_exit_code(action: Callable[[], int]) -> int:
    """Run a command and return the exit code; print exceptions for users as a message without traceback."""
    os.environ.setdefault(OMP_WAIT_POLICY, "PASSIVE")  # before torch is imported
    for stream in (sys.stdout, sys.stderr):
        # text prints in every locale: characters outside the encoding become escapes
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe in place of a file has no position
                stream.reconfigure(errors="backslashreplace")
    try:
        code = to_exit_code(action())
        sys.stdout.flush()  # report a full disk or closed pipe here, before Python exits
        return code
    except SystemExit as e:
        # Python prints a text in SystemExit and exits with 1
        if isinstance(e.code, str):
            raise
        raise SystemExit(to_exit_code(e.code)) from None
    except DryRun as e:
        print(_escape_controls(str(e)))
        return ExitCode.OK
    except UserError as e:
        print(f"error: {_escape_controls(str(e))}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except GateFailed as e:
        print(f"gate: {_escape_controls(str(e))}", file=sys.stderr)
        return ExitCode.GATE_FAILED
    except StopRequested as e:
        print(f"stopped: {e}", file=sys.stderr)
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except MemoryError as e:
        print(f"error: out of memory ({e or 'no further details'}); free some, or give the command "
              "less to do at a time", file=sys.stderr)
        return ExitCode.CRASH
    # the reader closed the pipe (`| head`): not an error, but nothing more may be written
    except BrokenPipeError:
        _drop_output()
        return ExitCode.OK
    except OSError as e:
        # a full disk under standard output has no file name
        if e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _drop_output()
            print(f"error: standard output, or a file of this command: {os.strerror(e.errno)}; free some "
                  "space, or write elsewhere, and run the same command again", file=sys.stderr)
            return ExitCode.USER_ERROR
        if e.filename is None:  # a defect: not about a file of the user
            raise
        path = _escape_controls(os.fsdecode(e.filename)[:MAX_PATH_CHARS])
        print(f"error: {path}: cannot be used ({e.strerror or e}); look at the path, its permissions and its "
              "disk", file=sys.stderr)
        return ExitCode.USER_ERROR


def _escape_controls(message: str) -> str:
    """Escape control characters: file names and contents may come from strangers."""
    return message if message.replace("\n", "").isprintable() else escape_controls(message)


def _drop_output() -> None:
    """Redirect the rest of standard output to /dev/null, so that Python exits without another error."""
    with contextlib.suppress(OSError):  # stdout has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
