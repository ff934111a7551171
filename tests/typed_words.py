"""Parse command-line words into a settings class, and list the problems of settings."""

from collections.abc import Iterable, Mapping, Sequence
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


def format_set_options(settings: Iterable[str] | Mapping[str, object]) -> list[str]:
    """Return `--set KEY=VALUE` for each setting, given as text or as a mapping from key to value."""
    if isinstance(settings, Mapping):
        settings = [f"{key}={value}" for key, value in settings.items()]
    return [word for setting in settings for word in ("--set", setting)]
