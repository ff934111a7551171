"""Options of a command as its command line has them, for commands that start other commands."""

from __future__ import annotations

import argparse
from functools import reduce
from typing import Any

from megatron_sov.base.settings import add_options


def words_of(options: Any) -> list[str]:
    """Return the words that `read_options` reads as these options again: positional arguments, then all that
    is not its default.

    Args:
        options: of a class that `add_options` takes.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, type(options))
    arguments, named = list[str](), list[str]()
    for action in parser._actions:
        if not hasattr(action, "declared"):  # --dry-run, which no class has
            continue
        value = reduce(getattr, action.dest.split("."), options)
        if value is None or value == action.declared:
            continue
        if action.nargs == 0:
            named += action.option_strings
            continue
        values = map(str, value if isinstance(value, tuple) else (value,))
        if not action.option_strings:
            arguments += values
            continue
        (option,) = action.option_strings
        for text in values:  # one that begins with a dash would be taken for an option
            named += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return [*arguments, *named]
