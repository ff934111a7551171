"""The program `megatron-sov COMMAND ...`. Imports only the typed command's module."""

import argparse
import shlex
import sys
import time
from functools import partial
from typing import Any

from megatron_sov.base.command_line import (
    HelpFormatter, Parser, append_examples, build_program_parser, check_arguments, find_check,
    format_command_list, format_version, order_help, run_to_exit_code)
from megatron_sov.base.errors import ExitCode, Fix, UserError
from megatron_sov.base.hints.commands import (
    build_command_error, build_order_error, import_commands, unwrap_launcher)
from megatron_sov.base.hints.lines import propose_line
from megatron_sov.base.hints.removed import check_command
from megatron_sov.commands import COMMANDS
from megatron_sov.runs.launch_environment import (
    export_command, has_launcher, is_first_rank, process_started_s, set_command_start)

PROGRAM = "megatron-sov"


def build_help_parser() -> argparse.ArgumentParser:
    """Build the top-level parser, which prints only the program's help."""
    texts = {name: c.help for name, c in COMMANDS.items()}
    groups = {name: c.group for name, c in COMMANDS.items()}
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage=f"{PROGRAM} COMMAND ...", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train your own language model, from raw text to a Hugging Face folder.",
        epilog=f"{format_command_list(texts, groups)}\n\n{PROGRAM} COMMAND --help explains a command and "
               "shows examples.\nexit codes: 0 complete, 2 your input needs a change, 3 a gate did not pass, "
               "75 stopped with everything saved,\n76 a step hung, 77 a process gave wrong bits")
    parser.add_argument("--version", action="version", version=format_version(PROGRAM))
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def build_parser() -> Parser:
    """Build the parser for all commands; a command with two words is a subcommand under the first word."""
    parser = build_program_parser(PROGRAM, "Train your own language model.",
                                  {name: command for name, command in COMMANDS.items() if " " not in name})
    top = _find_subparsers(parser)
    for first in dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name):
        group = top.choices[first] if first in top.choices else top.add_parser(first, help=f"{first} COMMAND")
        import_commands(group)
        below = _find_subparsers(group)
        if below is None:
            below = group.add_subparsers(metavar="COMMAND", parser_class=type(group))
            # shell completion proposes the second word before RECIPE
            group._actions.insert(0, group._actions.pop())
        for second in list_subcommands(first):
            COMMANDS[f"{first} {second}"].declare(second, below)
    return parser


def _find_subparsers(parser: argparse.ArgumentParser) -> Any:
    return next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)


def run_command(argv: list[str], began_s: float) -> int:
    """Parse and run a command.

    Args:
        argv: name and arguments.
        began_s: Unix time when the command started; see `get_command_start`.

    Raises:
        UserError: an error with a fix lists all errors of the command line and a corrected line.
    """
    set_command_start(began_s)
    try:
        return _run_once(argv)
    except UserError as e:
        if has_launcher():
            if not is_first_rank() and e.fix and e.fix.line:
                time.sleep(3)  # the first rank prints, and torchrun ends all ranks at the first exit
                raise SystemExit(ExitCode.USER_ERROR) from None
            raise
        check = partial(_run_once, only_checks=True)
        raise propose_line(PROGRAM, argv, e, check, find_check) from None
    finally:
        set_command_start(None)


def _run_once(argv: list[str], only_checks: bool = False) -> int:
    """Run a command line once; `only_checks`: see `check_arguments`."""
    argv = order_help(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        build_help_parser().print_help()
        return ExitCode.OK if argv else ExitCode.USER_ERROR
    if argv[0].startswith("-") and argv[0] not in ("--version",):
        raise build_order_error(PROGRAM, argv, COMMANDS)
    if argv[0] not in COMMANDS and (meant := unwrap_launcher(argv)) is not None:
        raise UserError(f"{PROGRAM} {argv[0]}: starts another program; {PROGRAM} starts its processes itself",
                        Fix(f"{PROGRAM} {shlex.join(meant)}"))
    name, rest = split_command(argv)
    if name == "--version":
        print(format_version(PROGRAM))
        return ExitCode.OK
    check_command(PROGRAM, argv)
    children = list_subcommands(name)
    if children and name not in COMMANDS:
        return _run_group(name, children, rest)
    if name not in COMMANDS:
        raise build_command_error(PROGRAM, name, list(COMMANDS), rest)
    command = COMMANDS[name]
    module = command.load()
    sub = Parser(prog=f"{PROGRAM} {name}", description=command.help, formatter_class=HelpFormatter)
    module.add_arguments(sub)
    append_examples(sub, command, PROGRAM)
    if children:
        heading = f"{name} COMMAND, each with a --help of its own"
        listed = format_command_list(children, dict.fromkeys(children, heading))
        sub.epilog = "\n\n".join(filter(None, (listed, sub.epilog)))
    args = sub.parse_args(rest)
    if only_checks:
        check_arguments(args, module)
        return ExitCode.OK
    export_command(argv)
    return int(module.run(args))


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the command (one or two words) and the arguments."""
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    return " ".join(argv[:words]), argv[words:]


def list_subcommands(name: str) -> dict[str, str]:
    """Return second word -> help for the two-word commands that begin with `name`."""
    return {command.removeprefix(f"{name} "): c.help for command, c in COMMANDS.items()
            if command.startswith(f"{name} ")}


def _run_group(name: str, children: dict[str, str], rest: list[str]) -> int:
    """Print the help for a first word that needs a second word."""
    if rest and rest[0] not in ("-h", "--help"):
        raise build_command_error(f"{PROGRAM} {name}", rest[0], list(children), rest[1:])
    argparse.ArgumentParser(prog=f"{PROGRAM} {name}", usage=f"{PROGRAM} {name} COMMAND ...",
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=format_command_list(children, dict.fromkeys(
                                children, "COMMAND, each with a --help of its own"))).print_help()
    return ExitCode.OK if rest else ExitCode.USER_ERROR


def main(argv: list[str] | None = None) -> int:
    """Run `megatron-sov`; a `UserError` becomes a message and `ExitCode.USER_ERROR`.

    Args:
        argv: command and arguments; None: `sys.argv`, with the start time of the process.
    """
    if argv is None:
        return run_to_exit_code(lambda: run_command(sys.argv[1:], process_started_s()))
    return run_to_exit_code(lambda: run_command(argv, time.time()))


if __name__ == "__main__":
    sys.exit(main())
