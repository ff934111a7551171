"""Parse command-line words into a settings class, and list the problems of settings."""

from collections.abc import Sequence
from typing import Any, TypeVar

from megatron_sov.base.command_line import Parser
from megatron_sov.base.settings import add_options, find_all_problems, read_options

S = TypeVar("S")


def parse_settings(cls: type[S], words: Sequence[str]) -> S:
    """Parse command-line words into `cls`."""
    parser = Parser(prog="typed")
    add_options(parser, cls)
    return read_options(cls, parser.parse_args(list(words)))


def keys_of(settings: Any) -> list[str]:
    """Return the keys of all problems: broken bounds, or if there are none, broken rules between settings."""
    return [problem.key for problem in find_all_problems(settings)]
