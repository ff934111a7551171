"""Words of a command line as the class of settings that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from megatron_sov.command_line import Parser
from megatron_sov.settings import add_options, read_options

S = TypeVar("S")


def typed(cls: type[S], words: Sequence[str]) -> S:
    """Return what the words give."""
    parser = Parser(prog="typed")
    add_options(parser, cls)
    return read_options(cls, parser.parse_args(list(words)))
