"""What all our programs do alike: their version, their arguments, and how an error becomes one sentence and
an exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_sov.base.errors import (
    DryRun, ExitCode, Fix, GateFailed, StopRequested, UserError, to_exit_code, visible)
from megatron_sov.base.hints.commands import unknown_command
from megatron_sov.base.hints.lines import join_sentences, propose_line
from megatron_sov.base.hints.missing import missing_words, text_option
from megatron_sov.base.hints.removed import check_command
from megatron_sov.base.hints.words import check_words
from megatron_sov.version import __version__

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> its module with `build_parser` and `main`."""
MAX_PROPOSALS = 4
"""Times that a proposed line is parsed, and mended, before it is shown."""
MAX_PATH_CHARS = 300
"""Of a path that is shown; the longest that a disk takes are longer than a screen."""


def version_of(program: str) -> str:
    return f"{program} {__version__}"


class HelpText(argparse.HelpFormatter):
    """Fills a text of one line, and keeps the lines of one that has several."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.split("\n"))
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, raised as a `UserError`, without the usage."""

    _typed: Sequence[str] = ()
    listing = ""
    """Its commands under their headings; "": argparse lists them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse would make `Path("")` this folder
        self.register("type", Path, _path)

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
        """Check a word against those that are taken, except where `read_options` does."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            typed = list(self._typed)
            if typed[0].startswith("-"):
                raise UserError(f"{self.prog}: an action comes before the options: "
                                f"{', '.join(action.choices)} (`{self.prog} ACTION --help` shows more)")
            raise unknown_command(self.prog, value, list(action.choices), typed[typed.index(value) + 1:])
        if not getattr(action, "is_setting", False):
            super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        if "are required: " in message and "--resume" in self._typed:
            message += "; `megatron-sov resume RUN` goes on without them"
        elif "are required: " in message and not self.listing:
            names = message.partition("are required: ")[2]
            choices, line = missing_words(self, self._typed, names)
            raise UserError(f"{self.prog}: {message}{choices}", Fix(line))
        raise UserError(f"{self.prog}: {message} (--help lists what it takes)")

    def parse_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                   namespace: Any = None) -> argparse.Namespace:
        """Return the arguments.

        Raises:
            UserError: words that nothing takes, with the command line that is meant (`check_words`).  That
                line is parsed as well, and all that is wrong with it is in the same message.
        """
        typed = list(sys.argv[1:] if args is None else args)
        sentences: list[str] = []
        for _ in range(MAX_PROPOSALS):
            try:
                found = self._parse_once(typed, namespace)
            except UserError as e:
                sentences.append(e.sentence)
                words = shlex.split(e.fix.line) if e.fix else []
                program = self.prog.split()
                if words[:len(program)] != program:  # another command is meant, or none
                    raise UserError(join_sentences(sentences), e.fix) from None
                if words[len(program):] == typed:
                    break
                typed = words[len(program):]
            else:
                if not sentences:
                    return found
                sentences += _wrong_values(found)
                break
        raise UserError(join_sentences(sentences), Fix(f"{self.prog} {shlex.join(typed)}".rstrip()))

    def _parse_once(self, typed: Sequence[str], namespace: Any) -> argparse.Namespace:
        found, rest = self.parse_known_args(self._checked(typed), namespace)
        if not rest:
            return found
        # a shell splits `--set a.b=1 c.d=2`; the second word has no option of its own
        settings = [word for word in rest if re.match(r"[a-z]\w*(\.\w+)+=", word)]
        if settings and "--set" in _options_of(self):
            written = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
            raise UserError(f"{settings[0]}: every setting needs a --set of its own; write {written}")
        if len(rest) == 1 and (option := text_option(self, rest[0], self._typed)):
            line = shlex.join([*(word for word in self._typed if word != rest[0]), option, rest[0]])
            raise UserError(f"{self.prog}: {rest[0]}: belongs to an option", Fix(f"{self.prog} {line}"))
        self.error(f"{shlex.join(rest)}: nothing takes this")

    def _checked(self, typed: Sequence[str]) -> Sequence[str]:
        """Return the words under today's names; a program and a command of commands leave them to the command
        that is typed."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return typed
        return check_words(self, typed)


def _wrong_values(found: argparse.Namespace) -> list[str]:
    """Return the sentence about values of a proposed line that the command refuses; empty: it takes them."""
    from megatron_sov.base.settings import read_options

    try:
        if options_class := getattr(found, "options_class", None):
            read_options(options_class, found)
    except UserError as e:
        return [str(e)]
    return []


def _path(text: str) -> Path:
    """Return a path that is given; an empty one, as of a variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, where a file or folder is to be named")
    return Path(text)


def _options_of(parser: Parser) -> list[str]:
    """Return the options of a parser and of all commands below it; of a program those of the typed command
    alone, since each other one would be imported."""
    typed = [child for action in parser._actions if isinstance(action, argparse._SubParsersAction)
             for child in action.choices.values() if not getattr(child, "_module", "")]
    return [option for top in (typed if parser.listing else [parser]) for each in fill_commands(top)
            for option in each._option_string_actions]


def fill_commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Import every command below a parser; returns the parser and all below it."""
    if isinstance(parser, CommandParser):
        parser.fill()
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [each for child in action.choices.values() for each in fill_commands(child)]
    return found


def parser_with_all(program: str) -> Parser:
    """Return the parser of one of `PROGRAMS` with the arguments of every command."""
    parser: Parser = importlib.import_module(PROGRAMS[program]).build_parser()
    fill_commands(parser)
    return parser


@dataclass(frozen=True)
class Command:
    """One command of a program: the module that implements it and its line in `--help`."""

    module: str
    """Dotted path of the module with `add_arguments(parser)` and `run(args) -> exit code`, or, where several
    commands share a file, `module:NAME` of an object with these."""
    help: str
    """One line for `--help`."""
    group: str = ""
    """Heading under which the program's help lists it."""
    page: str = ""
    """Its page below docs/."""
    examples: tuple[str, ...] = ()
    """What its help shows, without the program's name."""

    def ending(self, program: str, words: str = "") -> str:
        """Return the end of its help: examples and page.

        Args:
            program: its name.
            words: what the examples begin with that are shown; "": all.
        """
        begin = f"{words} ".lstrip()
        shown = [f"  {program} {line}" for line in self.examples if f"{line} ".startswith(begin)]
        page = [f"page: docs/{self.page}"] if self.page else []
        return "\n".join([*(["examples:"] if shown else []), *shown, *page])

    def declare(self, name: str, below: Any) -> None:
        """Add it to what `add_subparsers` returned, whose parsers are `CommandParser`s."""
        # the module is a name until its command is parsed: `--help` imports none
        child = below.add_parser(name, help=self.help.replace("%", "%%"))
        child._module, child._command = self.module, self

    def load(self) -> Any:
        """Import it."""
        return _load(self.module)


def _load(reference: str) -> Any:
    # not by pkgutil.resolve_name: of a module that is not there it says that its package lacks an attribute
    module, _, name = reference.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


class CommandParser(Parser):
    """The parser of one command, whose module is imported when something is parsed by it: the other commands
    of the program cost nothing."""

    _module = ""
    _command: Command | None = None

    def fill(self) -> None:
        """Import the command's module and add its arguments, once."""
        # emptied first: filling twice would declare every option twice
        module, self._module = self._module, ""
        if module:
            _load(module).add_arguments(self)
            if self._command is not None:
                end_help(self, self._command, self.prog.split()[0])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(args if args is None else self._checked(args), namespace)


def end_help(parser: argparse.ArgumentParser, command: Command, program: str) -> None:
    """Let the help of a command, and of each action below it, end with its examples and its page."""
    if isinstance(parser, CommandParser) and parser._module and parser._command is not None:
        # its arguments come later, and `fill` ends its help then: what it lacks is that of the command above
        parser._command = dataclasses.replace(parser._command, page=parser._command.page or command.page,
                                              examples=parser._command.examples or command.examples)
        return
    words = parser.prog.removeprefix(program).strip()
    own = textwrap.fill(" ".join((parser.epilog or "").split()), 100)
    parser.epilog = "\n\n".join(filter(None, (own, command.ending(program, words)))) or None
    parser.formatter_class = HelpText
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                end_help(child, command, program)


def list_commands(commands: Mapping[str, str], groups: Mapping[str, str]) -> str:
    """Return a line for each command of a program, under the headings of their groups.

    Args:
        commands: name -> line of help.
        groups: name -> heading, in the order of the headings; what it lacks comes last.
    """
    width = max(map(len, commands), default=0)
    lines = []
    for heading in dict.fromkeys([*groups.values(), ""]):
        rows = [f"  {name:<{width}}  {text}" for name, text in commands.items()
                if groups.get(name, "") == heading]
        lines += [f"{heading or 'commands'}:", *rows, ""] if rows else []
    return "\n".join(lines).rstrip()


def parser_of(program: str, description: str, commands: Mapping[str, Command]) -> Parser:
    """Return the parser of a program; a command is imported when it is parsed."""
    parser = Parser(prog=program, description=description)
    parser.listing = list_commands({name: c.help for name, c in commands.items()},
                                   {name: c.group for name, c in commands.items()})
    parser.add_argument("--version", action="version", version=version_of(program))
    actions = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                    parser_class=CommandParser)
    for name, command in commands.items():
        command.declare(name, actions)
    return parser


def run_program(parser: Parser, commands: Mapping[str, Command], argv: Sequence[str] | None) -> int:
    def action() -> int:
        typed = list(sys.argv[1:] if argv is None else argv)
        check_command(parser.prog, typed)
        try:
            args = parser.parse_args(typed)
            return int(commands[args.command].load().run(args))
        except UserError as e:
            if e.fix is None:
                raise
            raise propose_line(parser.prog, typed, e, parser.parse_args) from None

    return exit_code(action)


OMP_WAIT_POLICY = "OMP_WAIT_POLICY"
"""Variable of OpenMP. Threads that spin while they wait take the cores of the threads that they wait for, if
other programs run as well (measured: 14 times slower with three programs per core)."""


def exit_code(action: Callable[[], int]) -> int:
    """Run a command and return its exit code; what a user can mend becomes one message."""
    os.environ.setdefault(OMP_WAIT_POLICY, "PASSIVE")  # before torch is imported
    for stream in (sys.stdout, sys.stderr):
        # text of any language is shown in any locale, with escapes for what that does not have
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe that took a file's place cannot say where it is
                stream.reconfigure(errors="backslashreplace")
    try:
        code = to_exit_code(action())
        sys.stdout.flush()  # what the disk or the reader refuses shows here, not when Python ends
        return code
    except SystemExit as e:
        # Python prints such a text itself and ends with 1
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
        print(f"error: out of memory ({e or 'no more than that is known'}); free some, or give the command "
              "less to do at a time", file=sys.stderr)
        return ExitCode.CRASH
    # the reader has enough (`| head`): no error, and nothing more may be written
    except BrokenPipeError:
        _drop_output()
        return ExitCode.OK
    except OSError as e:
        # standard output on a full disk has no file name to show
        if e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _drop_output()
            print(f"error: standard output, or a file of this command: {os.strerror(e.errno)}; free some "
                  "space, or write elsewhere, and run the same command again", file=sys.stderr)
            return ExitCode.USER_ERROR
        if e.filename is None:  # not about a file that somebody named: a defect
            raise
        path = _escape_controls(os.fsdecode(e.filename)[:MAX_PATH_CHARS])
        print(f"error: {path}: cannot be used ({e.strerror or e}); look at the path, its permissions and its "
              "disk", file=sys.stderr)
        return ExitCode.USER_ERROR


def _escape_controls(message: str) -> str:
    """Return a message without control characters: names of files, and what files hold, are of strangers."""
    if message.replace("\n", "").isprintable():
        return message
    return visible(message)


def _drop_output() -> None:
    """Let Python end in peace: what is left of standard output goes nowhere."""
    with contextlib.suppress(OSError):  # it is no file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
