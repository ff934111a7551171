"""`megatron-sov resume RUN [ARGUMENTS]`: the command that began a run, from what the run's folder says of it.

Settings and data are those of RUN/config.json, the other options those of RUN/command.json, and what is typed
behind RUN goes before both.  Whether a run may go on with it is decided where `--resume` is, by the command
itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shlex
from pathlib import Path
from typing import Any

from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import read_options
from megatron_sov.commands import COMMANDS
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.commands.train.setup.stage_options import StageOptions
from megatron_sov.runs.folder import CONFIG, RunFolder, TypedCommand, read_command
from megatron_sov.runs.launch_environment import export_command, has_launcher, is_first_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of the run")
    more = parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER,
                               help="Options of the command that began it, where something is to change: "
                                    "--nproc 4, --set train.steps=400, --dry-run")
    more.required = False  # where RUN is missing, argparse would name both


def run(typed: argparse.Namespace) -> int:
    """Continue a run; returns what its command returns.

    Raises:
        UserError: the folder does not say how it was begun, or the run cannot go on so.
    """
    folder = typed.run.absolute()
    began = read_command(folder)
    name, parser, options = typed_options(began)
    goes_on = in_folder(options, folder, began)
    refuse_unsaid_code(folder, began, list_option_words(goes_on), typed.arguments)
    words = [*list_option_words(dataclasses.replace(goes_on, plugins=())), *typed.arguments]
    if enter_folder(began) and is_first_rank():
        print(f"resume: paths are read from {began.folder}, where the run was begun")
    if is_first_rank():
        print(f"resume: megatron-sov {name} {shlex.join(words)}", flush=True)
        for change in option_changes(options, options_of_words(parser, words)):
            print(f"resume: {change}", flush=True)
    return run_words(name, parser, words)


def typed_options(began: TypedCommand) -> tuple[str, Parser, Any]:
    """Return the command that began a run, what parses it, and the options that were typed, with --resume.

    Raises:
        UserError: it is none that trains.
    """
    name, parser = _parser_of(began)
    return name, parser, options_of_words(parser, [*began.words[len(name.split()):], "--resume"])


def enter_folder(began: TypedCommand) -> bool:
    """Go where a command was typed, since its paths are read from there; returns whether that is another
    folder."""
    is_elsewhere = began.folder != Path.cwd() and began.folder.is_dir()
    if is_elsewhere:
        os.chdir(began.folder)
    return is_elsewhere


def run_words(name: str, parser: Parser, words: list[str]) -> int:
    """Run a command by its words, as if they had been typed; returns its exit code."""
    export_command([*name.split(), *words])
    arguments = parser.parse_args(words)
    return int(COMMANDS[name].load().run(arguments))


TAKES_CODE = ("RECIPE", "--plugin", "--reward", "--environment")
"""Options of training commands whose value may be FILE.py:NAME or MODULE:NAME."""


def refuse_unsaid_code(folder: Path, began: TypedCommand, words: list[str], arguments: list[str],
                       again: str = "") -> None:
    """Refuse to run code that only the run's folder names: that is data, and may be another's.

    Args:
        folder: of the run.
        began: the command that began it.
        words: that would go on.
        arguments: what was typed now.
        again: the command that was typed, for the message; empty: `megatron-sov resume`.

    Raises:
        UserError: naming what is to be typed again.
    """
    said = {absolute_code(word, began.folder) for word in arguments}
    needed = [[option, absolute_code(word, began.folder)]
              for option, word in itertools.pairwise(["RECIPE", *words])
              if option in TAKES_CODE and is_reference(word)]
    config = RunFolder(folder).config()
    needed += [["--plugin", code.reference] for code in (config.code if config is not None else ())
               if code.kind != "recipe" and ["--plugin", code.reference] not in needed]
    needed += [["--gate-with", word] for word in words if "--allow-task-code" in word]
    if unsaid := [words for words in needed if words[1] not in said]:
        way = (f"`megatron-sov {again or f'resume {shlex.quote(str(folder))}'} "
               f"{' '.join(map(shlex.join, needed))}`" if all(option.startswith("-") for option, _ in needed)
               else "the whole command with --resume")
        raise UserError(f"{folder}: the run has code of yours ({unsaid[0][1]}), and a file that is run is "
                        f"named on the command line; type {way}")


def absolute_code(word: str, folder: Path) -> str:
    """Return FILE.py:NAME with the file's whole path, and other words as they are."""
    file, colon, name = word.rpartition(":")
    return f"{folder / file}:{name}" if colon and file.endswith(".py") else word


def _parser_of(began: TypedCommand) -> tuple[str, Parser]:
    """Return the command that began a run, and what parses it."""
    name = next((name for name in (" ".join(began.words[:2]), *began.words[:1]) if name in COMMANDS), "")
    if not name:
        raise UserError(f"command {' '.join(began.words[:2])!r}: began the run and is none of ours; type the "
                        "whole command again with --resume")
    parser = Parser(prog=f"megatron-sov {name}")
    COMMANDS[name].load().add_arguments(parser)
    if not issubclass(parser.get_default("options_class") or object, StageOptions):
        raise UserError(f"command {name!r}: began the run and trains nothing; type it again")
    return name, parser


def options_of_words(parser: Parser, words: list[str]) -> Any:
    """Return the options of a command's words, of the class that its parser was made of."""
    return read_options(parser.get_default("options_class"), parser.parse_args(words))


def in_folder(options: Any, folder: Path, began: TypedCommand) -> Any:
    """Return the options with the run where it lies now, and settings and data from its config.json where it
    has one of its own: a run of stages is planned again from what was typed."""
    nproc = None if has_launcher() else options.nproc or (began.processes if began.processes > 1 else None)
    options = dataclasses.replace(options, run=folder, resume=True, nproc=nproc, dry_run=False,
                                  inject=(), until=None)
    if not (folder / CONFIG).is_file():
        return options
    return dataclasses.replace(options, recipe=None, configs=(folder / CONFIG,), settings=(), data=(),
                               deterministic=False)


REPLACED = ("run", "resume", "recipe", "configs", "plugins", "data", "dry_run", "deterministic", "until")
"""Options whose values the folder has."""


def option_changes(before: Any, now: Any) -> list[str]:
    """Return a line for each option that differs from what the run was begun with."""
    lines = []
    for field in dataclasses.fields(now):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name in REPLACED:
            continue
        if field.name == "settings":
            lines += [f"--set {text}" for text in new]
        elif new != old:
            lines.append(f"--{field.name.replace('_', '-')} was {old}, is {new}")
    return lines
