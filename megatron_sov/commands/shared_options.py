"""Options shared by several commands, and conversion from options to command-line words."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.settings import Flag, add_options
from megatron_sov.model.config import parse_data_paths
from megatron_sov.model.config.data import split_source_name

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.runs.folder import RunEvents

TARGET_HELP = "Checkpoint, run (its newest one) or Hugging Face folder."
ModelPath = Annotated[Path, Flag("TARGET", help=TARGET_HELP)]
AnyTarget = Annotated[str, Flag("TARGET", help="Checkpoint, run (its newest one), Hugging Face folder, or "
                                               "the address of an OpenAI-compatible endpoint, up to /v1.")]
CheckpointPath = Annotated[Path, Flag("CHECKPOINT", help="Checkpoint, or run (its newest one).")]
CheckpointOut = Annotated[Path, Flag("OUT", help="Checkpoint folder to write.")]


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """`--overwrite` for commands that write a file or a folder."""

    overwrite: bool = False
    """Replace an existing output (same kind only)."""


@dataclass(frozen=True, kw_only=True)
class RedoOptions:
    """`--redo` for commands that continue after a kill."""

    redo: bool = False
    """Start over if the unfinished output was made with different options."""


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Outputs for figures besides the terminal."""

    json: bool = False
    """Print JSON."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also record the figures in DIR/events.jsonl, for the run's report."""


def list_option_words(options: Any) -> list[str]:
    """Return a command line from which `read_options` reads equal options: positional arguments, then options
    with non-default values.

    Args:
        options: instance of a class that `add_options` accepts.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, type(options))
    arguments, option_words = list[str](), list[str]()
    for action in parser._actions:
        # `read_options` reads declared options only; the derived --dry-run is not declared
        if not hasattr(action, "declared"):
            continue
        value = reduce(getattr, action.dest.split("."), options)
        if value is None or value == action.declared:
            continue
        if action.nargs == 0:
            option_words += action.option_strings
            continue
        values = map(str, value if isinstance(value, tuple) else (value,))
        if not action.option_strings:
            arguments += values
            continue
        (option,) = action.option_strings
        # join with "=": a value that begins with a dash would be parsed as an option
        for text in values:
            option_words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return [*arguments, *option_words]


def check_token_shards(data: Sequence[str]) -> None:
    """Raise `UserError` for a --data argument that is no folder of token shards."""
    for path in parse_data_paths(data):
        read_manifest(split_source_name(path)[1], "tokens")


def parse_task_names(names: str | None) -> list[str]:
    """Split a `--tasks` value at commas."""
    parts = (names or "").split(",")
    return [part.strip() for part in parts if part.strip()]


def get_target_step(target: "Target", events: "RunEvents") -> int | None:
    """Return a checkpoint's step; for a Hugging Face folder, the run's last step."""
    return events.last_step() if target.step is None else target.step
