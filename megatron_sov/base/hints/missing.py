"""Completes command lines that lack required options and arguments, with values or placeholders."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence

from megatron_sov.base.errors import choose_free_path
from megatron_sov.base.hints.kinds import find_only_folder
from megatron_sov.base.hints.table import load_table

_TEXT_OPTIONS = ("--prompts", "--input", "--text", "--data", "--prompt")


def complete_line(parser: argparse.ArgumentParser, typed: Sequence[str], names: str) -> tuple[str, str]:
    """Return the choices of missing options as the end of a message, and the line with placeholders for all
    missing arguments; `names` lists them as argparse does in its message."""
    lacking = [action for action in parser._actions if action.required and _is_listed(action, names)]
    rows = load_table()["missing"]
    choices = []
    for action in lacking:
        name = "".join(action.option_strings[:1]) or str(action.metavar or action.dest)
        text = rows.get(name, {}).get("takes") or ", ".join(map(str, action.choices or ()))
        choices += [f"; {name} takes {text}"] if name and text else []
    names_ = [str(action.metavar or action.dest) for action in lacking if not action.option_strings]
    first = [rows.get(f"{parser.prog.partition(' ')[2]} {name}", {}).get("write", name) for name in names_]
    last = [f"{action.option_strings[0]} {choose_placeholder(action, parser.prog)}" for action in lacking
            if action.option_strings]
    # argparse fills positional arguments in their order
    positionals, options = split_positionals(parser, typed)
    has_no_positional = all(action.option_strings for action in parser._actions)
    if has_no_positional and len(positionals) == 1 and (
            option := find_text_option(parser, positionals[0], typed)):
        options, positionals = [*options, option, *positionals], []
        last = [word for word in last if not word.startswith(f"{option} ")]
    elif has_no_positional and len(positionals) == len(last) == 1 and os.path.isdir(positionals[0]):
        last, positionals = [f"{last[0].split()[0]} {shlex.quote(positionals[0])}"], []
    parts = [parser.prog, shlex.join(positionals), *first, shlex.join(options), *last]
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


def choose_placeholder(action: argparse.Action, program: str = "") -> str:
    """Return the value to write for a missing option: a new folder, the first choice, or the value's name."""
    rows, name = load_table()["missing"], action.option_strings[0]
    row = rows.get(f"{program} {name}", rows.get(name, {}))
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
