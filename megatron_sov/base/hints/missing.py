"""Completes command lines that lack required options and arguments, with values or placeholders."""

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sov.base.errors import choose_free_path
from megatron_sov.base.hints.kinds import find_only_folder
from megatron_sov.base.hints.table import load_table

_TEXT_OPTIONS = ("--prompts", "--input", "--text", "--data", "--prompt")


def complete_line(parser: argparse.ArgumentParser, typed: Sequence[str], names: str) -> tuple[str, str]:
    """Return (choices of the missing arguments as the end of a message, line with a placeholder for each
    missing argument). `names`: the missing arguments as argparse lists them in its message."""
    choices, new_positionals, new_options = list[str](), list[str](), list[str]()
    for action in parser._actions:
        is_typed = bool(set(action.option_strings) & set(typed))
        if not action.required or is_typed or not _is_listed(action, names):
            continue
        name = "".join(action.option_strings[:1]) or str(action.metavar or action.dest)
        row = find_missing_row(parser.prog, name)
        if text := row.get("takes") or ", ".join(map(str, action.choices or ())):
            choices.append(f"; {name} takes {text}")
        if action.option_strings:
            new_options.append(f"{name} {choose_placeholder(action, parser.prog)}")
        else:
            new_positionals.append(row.get("write", name))
    # argparse fills positional arguments in their order
    positionals, options = split_positionals(parser, typed)
    has_no_positional = all(action.option_strings for action in parser._actions)
    if has_no_positional and len(positionals) == 1 and (
            option := find_text_option(parser, positionals[0], typed)):
        options, positionals = [*options, option, *positionals], []
        new_options = [text for text in new_options if not text.startswith(f"{option} ")]
    elif has_no_positional and len(positionals) == len(new_options) == 1 and os.path.isdir(positionals[0]):
        new_options = [f"{new_options[0].split()[0]} {shlex.quote(positionals[0])}"]
        positionals = []
    parts = [parser.prog, shlex.join(positionals), *new_positionals, shlex.join(options), *new_options]
    return "".join(choices), " ".join(filter(None, parts))


def _is_listed(action: argparse.Action, names: str) -> bool:
    """Return whether argparse's message about missing arguments lists an argument."""
    if action.option_strings:
        return bool(set(action.option_strings) & set(re.split(r"[/,\s]+", names)))
    return str(action.metavar or action.dest) in names.split(", ")


def find_text_option(parser: argparse.ArgumentParser, word: str, typed: Sequence[str]) -> str:
    """Return the option that takes a free word as a prompt or a text file; "": none."""
    if word.startswith("-"):
        return ""
    order = _TEXT_OPTIONS if os.path.isfile(word) else ("--prompt", *_TEXT_OPTIONS)
    return next((option for option in order if option in parser._option_string_actions and option not in typed
                 and (option == "--prompt" or os.path.exists(word))), "")


def find_missing_row(program: str, name: str) -> Mapping[str, Any]:
    """Return the row of the table `missing` for an argument of a command, or of every command; {}: none."""
    rows = load_table()["missing"]
    row: Mapping[str, Any] = rows.get(f"{program} {name}", rows.get(name, {}))
    return row


def choose_placeholder(action: argparse.Action, program: str) -> str:
    """Return the value to write for a missing option: a new folder, the first choice, or the value's name."""
    row = find_missing_row(program, action.option_strings[0])
    if new := row.get("new"):
        return choose_free_path(new)
    if folder := find_only_folder(row["kind"]) if "kind" in row else "":
        return folder
    choices = list(action.choices or ())
    return str(row.get("write") or (choices[0] if choices else action.metavar or action.dest.upper()))


def split_positionals(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into positional arguments, and options with their values."""
    nargs_by_option = {name: action.nargs for action in parser._actions for name in action.option_strings}
    positionals: list[str] = []
    options: list[str] = []
    num_open = 0.0  # values that the last option may still take
    for word in words:
        name, equals, _ = word.partition("=")
        if name in nargs_by_option:
            nargs = nargs_by_option[name]
            num_open = 1 if nargs in (None, "?") else float("inf")
            if equals or nargs == 0:
                num_open = 0
            options.append(word)
        elif num_open:
            num_open -= 1
            options.append(word)
        else:
            positionals.append(word)
    return positionals, options
