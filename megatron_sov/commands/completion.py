"""`megatron-sov completion`: what a shell has to know to complete our commands and options."""

from __future__ import annotations

import argparse
import importlib

from megatron_sov.command_line import Parser, fill_commands
from megatron_sov.errors import ExitCode

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.add_argument("program", nargs="?", choices=PROGRAMS, default="megatron-sov",
                        help="whose commands (default megatron-sov)")


def run(args: argparse.Namespace) -> int:
    """Print the completion file."""
    import shtab

    print(shtab.complete(parser_with_all(args.program), shell=args.shell))
    return ExitCode.OK


def parser_with_all(program: str) -> Parser:
    """Return the parser of a program with every command's arguments."""
    parser: Parser = importlib.import_module(PROGRAMS[program]).build_parser()
    for each in fill_commands(parser):
        for action in each._actions:
            if isinstance(action.choices, dict) and not isinstance(action, argparse._SubParsersAction):
                action.choices = tuple(action.choices)  # shtab takes a mapping for commands
    return parser
