"""`megatron-sov completion`: what a shell has to know to complete our commands and options."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from megatron_sov.base.command_line import Parser, fill_commands
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, add_options, read_options

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print the script with which a shell completes commands and options."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Flag("SHELL")]
    """Which shell: bash, zsh or fish."""
    program: Annotated[Literal["megatron-sov", "sov-data", "sov-tokenizer"], Flag("PROGRAM")] = "megatron-sov"
    """Whose commands: megatron-sov (default), sov-data or sov-tokenizer."""


add_arguments = partial(add_options, cls=CompletionOptions)


def run(args: argparse.Namespace) -> int:
    options = read_options(CompletionOptions, args)
    import shtab

    print(shtab.complete(parser_with_all(options.program), shell=options.shell))
    return ExitCode.OK


def parser_with_all(program: str) -> Parser:
    """Return the parser of a program with every command's arguments."""
    parser: Parser = importlib.import_module(PROGRAMS[program]).build_parser()
    for each in fill_commands(parser):
        for action in each._actions:
            if isinstance(action.choices, dict) and not isinstance(action, argparse._SubParsersAction):
                action.choices = tuple(action.choices)  # shtab takes a mapping for commands
    return parser
