"""Parse command-line words into a settings class, and list the problems of settings."""

from collections.abc import Sequence
from typing import Any, TypeVar

from megatron_sov.base.command_line import Parser
from megatron_sov.base.settings import add_options, find_all_problems, read_options

S = TypeVar("S")


def typed(cls: type[S], words: Sequence[str]) -> S:
    """Parse command-line words into `cls`."""
    parser = Parser(prog="typed")
    add_options(parser, cls)
    return read_options(cls, parser.parse_args(list(words)))


def keys_of(settings: Any) -> list[str]:
    """Return the key of each problem of settings: their bounds, else the rules between them."""
    return [problem.key for problem in find_all_problems(settings)]
