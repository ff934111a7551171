"""Proposes what a command line lacks: required options and arguments with their values or placeholders."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_sov.base.hints.paths import name_free_path
from megatron_sov.base.hints.table import table


def missing_words(parser: argparse.ArgumentParser, typed: Sequence[str], names: str) -> tuple[str, str]:
    """Return the end of a message about arguments that are required: their choices; and a line with them.

    Args:
        parser: of the command.
        typed: what follows the command's name.
        names: the arguments, as argparse names them.
    """
    lacking = [action for action in parser._actions if action.required and (
        set(action.option_strings) & set(re.split(r"[/,\s]+", names))
        or (not action.option_strings and str(action.metavar or action.dest) in names.split(", ")))]
    rows = table()["missing"]
    choices = [f"{name} takes {rows.get(name, {}).get('takes') or ', '.join(map(str, action.choices or ()))}"
               for action in lacking for name in action.option_strings[:1]
               if action.choices or rows.get(name, {}).get("takes")]
    first = [str(action.metavar or action.dest) for action in lacking if not action.option_strings]
    last = [f"{action.option_strings[0]} {placeholder(action)}" for action in lacking
            if action.option_strings]
    named, rest = split_words(parser, typed)  # argparse fills positional arguments in their order
    takes_none = all(action.option_strings for action in parser._actions)
    if takes_none and len(named) == 1 and (option := text_option(parser, named[0], typed)):
        rest, named = [*rest, option, *named], []
        last = [word for word in last if not word.startswith(f"{option} ")]
    line = " ".join(filter(None, [parser.prog, shlex.join(named), *first, shlex.join(rest), *last]))
    return "".join(f"; {text}" for text in choices), line


def text_option(parser: argparse.ArgumentParser, word: str, typed: Sequence[str]) -> str:
    """Return the option that a word without one belongs to, as a prompt or a file of text; "": none."""
    known = parser._option_string_actions
    order = ("--prompts", "--input", "--text", "--data", "--prompt")
    return next((one for one in (order if Path(word).is_file() else ("--prompt", *order))
                 if one in known and one not in typed and not word.startswith("-")
                 and (one == "--prompt" or Path(word).exists())), "")


def placeholder(action: argparse.Action) -> str:
    """Return the value of a missing option: a new folder, its first choice, or its name."""
    row = table()["missing"].get(action.option_strings[0], {})
    if new := row.get("new"):
        return name_free_path(new)
    choices = list(action.choices or ())
    return str(row.get("write") or (choices[0] if choices else action.metavar or action.dest.upper()))


def split_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those of positional arguments, and options with their values."""
    takes = {name: action.nargs for action in parser._actions for name in action.option_strings}
    free: list[str] = []
    others: list[str] = []
    room = 0.0
    for word in words:
        name, equals, _ = word.partition("=")
        if name in takes:
            nargs = takes[name]
            room = 0 if equals or nargs == 0 else 1 if nargs in (None, "?") else float("inf")
            others.append(word)
        elif room:
            room -= 1
            others.append(word)
        else:
            free.append(word)
    return free, others
