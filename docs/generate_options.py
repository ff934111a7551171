"""Write docs/options.md from the commands' parsers."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.hints.commands import PROGRAMS, build_full_parser

PAGE = Path(__file__).parent / "options.md"
HEAD = """# Commands and their options

<!-- Written by docs/generate_options.py from what the commands declare; change it there. -->

Every command with its arguments. `COMMAND --help` prints them too, with examples. [Settings](config.md) has
what you can change with `--set`. With `--dry-run` you see what would be read and written.

| exit code | meaning |
|---|---|
| 0 | complete |
| 2 | your input needs a change |
| 3 | a gate did not pass |
| 75 | stopped with everything saved |
| 76 | a step hung |
| 77 | a process gave wrong bits |
"""


def build_page() -> str:
    tables = [line for program in PROGRAMS for line in iter_command_table(program)]
    sections = [line for program in PROGRAMS for parser in iter_parsers(build_full_parser(program))
                for line in iter_section(parser)]
    return "\n".join([HEAD, *tables, *sections]).rstrip() + "\n"


def iter_command_table(program: str) -> Iterator[str]:
    """Yield table lines for a program's commands, below the headings in `--help`."""
    commands = importlib.import_module(PROGRAMS[program]).COMMANDS
    for heading in dict.fromkeys(command.group for command in commands.values()):
        yield f"**{program}**: {heading.partition(' (')[0]}\n\n| command | does | page |\n|---|---|---|"
        for name, command in commands.items():
            if command.group == heading:
                yield f"| `{program} {name}` | {command.help} | [{command.page}]({command.page}) |"
        yield ""


def iter_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser with arguments, and its subcommands' parsers in the order in `--help`."""
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if any(action not in subcommands and not _is_common(action) for action in parser._actions):
        yield parser
    for action in subcommands:
        for child in action.choices.values():
            yield from iter_parsers(child)


def iter_section(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield lines for a command's section; commands in `iter_command_table` get no description."""
    name = parser.prog.replace(" [RECIPE]", "")
    yield f"## {name}\n"
    program, _, command = name.partition(" ")
    if parser.description and command not in importlib.import_module(PROGRAMS[program]).COMMANDS:
        yield f"{_escape_html(parser.description)}\n"
    yield "| argument | meaning |\n|---|---|"
    for action in parser._actions:
        if not _is_common(action) and not isinstance(action, argparse._SubParsersAction):
            formatter = parser._get_formatter()
            values = "" if action.nargs == 0 else formatter._format_args(
                action, action.metavar or action.dest)
            usage = " ".join([*action.option_strings[:1], *([values] if values else [])])
            prefix = "Needed. " if action.required and action.option_strings else ""
            text = formatter._expand_help(action) if action.help else ""
            yield f"| `{_escape_bars(usage)}` | {prefix}{_escape_bars(_escape_html(text))} |"
    yield ""


def _is_common(action: argparse.Action) -> bool:
    return isinstance(action, (argparse._HelpAction, argparse._VersionAction))


def _escape_html(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")


def _escape_bars(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write_atomically(PAGE, build_page().encode())
    print(PAGE)
