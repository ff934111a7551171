"""Writes docs/options.md, every option of every command, from what the commands declare: `python
docs/generate_options.py`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.command_line import PROGRAMS, build_full_parser

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


def listed(program: str) -> Iterator[str]:
    """Yield the table of a program's commands, under the headings of its help."""
    table = importlib.import_module(PROGRAMS[program]).COMMANDS
    for heading in dict.fromkeys(command.group for command in table.values()):
        yield f"**{program}**: {heading.partition(' (')[0]}\n\n| command | does | page |\n|---|---|---|"
        for name, command in table.items():
            if command.group == heading:
                yield f"| `{program} {name}` | {command.help} | [{command.page}]({command.page}) |"
        yield ""


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of each command below a parser, in the order of the program's help."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    own = [a for a in parser._actions if a not in below and not _is_of_all(a)]
    if own:
        yield parser
    for child in (child for action in below for child in action.choices.values()):
        yield from commands(child)


def _is_of_all(action: argparse.Action) -> bool:
    return isinstance(action, (argparse._HelpAction, argparse._VersionAction))


def section(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of one command; what those of the tables above are for is said there."""
    name = parser.prog.replace(" [RECIPE]", "")
    yield f"## {name}\n"
    program, _, rest = name.partition(" ")
    if parser.description and rest not in importlib.import_module(PROGRAMS[program]).COMMANDS:
        yield f"{_in_text(parser.description)}\n"
    yield "| argument | meaning |\n|---|---|"
    for action in parser._actions:
        if not _is_of_all(action) and not isinstance(action, argparse._SubParsersAction):
            formatter = parser._get_formatter()
            shown = formatter._format_args(action, action.metavar or action.dest) if action.nargs != 0 else ""
            typed = " ".join([*action.option_strings[:1], *([shown] if shown else [])])
            needed = "Needed. " if action.required and action.option_strings else ""
            text = formatter._expand_help(action) if action.help else ""
            yield f"| `{_in_cell(typed)}` | {needed}{_in_cell(_in_text(text))} |"
    yield ""


def _in_text(text: str) -> str:
    """Return text whose angle brackets are no HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """Return the whole page."""
    tables = [line for program in PROGRAMS for line in listed(program)]
    made = [line for program in PROGRAMS for command in commands(build_full_parser(program))
            for line in section(command)]
    return "\n".join([HEAD, *tables, *made]).rstrip() + "\n"


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
    print(PAGE)
