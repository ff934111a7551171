"""`megatron-sov completion`: what a shell has to know to complete our commands and options."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal

from megatron_sov.base.command_line import Parser, fill_commands
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.model.config import setting_names
from megatron_sov.model.recipes.requested import RecipeOptions

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

    parser = parser_with_all(options.program)
    for each in fill_commands(parser):
        if issubclass(each.get_default("options_class") or object, RecipeOptions):
            action: Any = each._option_string_actions["--set"]
            action.complete = settings_completion()
    print(shtab.complete(parser, shell=options.shell))
    if options.shell == "bash":
        print(BASH_END.format(program=options.program, function=options.program.replace("-", "_")))
    return ExitCode.OK


# a setting is typed on behind its =, so no blank may follow it
BASH_END = """
_sov_{function}() {{
  _shtab_{function}
  if [[ "${{COMPREPLY-}}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o filenames -F _sov_{function} {program}"""


@cache
def settings_completion() -> dict[str, Any]:
    """Return, as shtab takes it, what completes the names of settings behind `--set`."""
    names = " ".join(f"{name}=" for name in setting_names())
    return {"bash": "_sov_settings", "zsh": "_sov_settings", "fish": "(__sov_settings)", "preamble": {
        "bash": f"_sov_settings() {{\n  compgen -W '{names}' -- \"$1\"\n}}",
        "zsh": f"_sov_settings() {{\n  compadd -S '' -- {names}\n}}",
        "fish": f"function __sov_settings\n  string split ' ' '{names}'\nend"}}


def parser_with_all(program: str) -> Parser:
    """Return the parser of a program with every command's arguments."""
    parser: Parser = importlib.import_module(PROGRAMS[program]).build_parser()
    for each in fill_commands(parser):
        for action in each._actions:
            if isinstance(action.choices, dict) and not isinstance(action, argparse._SubParsersAction):
                action.choices = tuple(action.choices)  # shtab takes a mapping for commands
    return parser
