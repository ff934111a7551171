"""Options that several commands have, and their words for commands that start others; to import them costs
nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.settings import Flag, add_options

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.runs.folder import RunEvents

def list_option_words(options: Any) -> list[str]:
    """Return the words that `read_options` reads as these options again: positional arguments, then all that
    is not its default.

    Args:
        options: of a class that `add_options` takes.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, type(options))
    arguments, named = list[str](), list[str]()
    for action in parser._actions:
        # only options that a class declares can be read again
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
        # the form with = is unambiguous whatever the value begins with
        for text in values:  # one that begins with a dash would be taken for an option
            named += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return [*arguments, *named]


TARGET_HELP = "Checkpoint, run (its newest one) or Hugging Face folder."
ModelPath = Annotated[Path, Flag("TARGET", help=TARGET_HELP)]
AnyTarget = Annotated[str, Flag("TARGET", help="Checkpoint, run (its newest one), Hugging Face folder, or "
                                               "the address of an OpenAI-compatible endpoint, up to /v1.")]
CheckpointPath = Annotated[Path, Flag("CHECKPOINT", help="Checkpoint, or run (its newest one).")]
CheckpointOut = Annotated[Path, Flag("OUT", help="Checkpoint folder to write.")]


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """What commands take that write a file or a folder."""

    overwrite: bool = False
    """Replace what is already there, where it is of the same kind."""


@dataclass(frozen=True, kw_only=True)
class RedoOptions:
    """What commands take that go on behind a kill."""

    redo: bool = False
    """Begin anew where unfinished work on the output was asked for otherwise."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Where figures go beside the terminal."""

    json: bool = False
    """Print the figures as JSON."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""


def parse_task_names(names: str | None) -> list[str]:
    """Return the tasks of an option, separated by commas."""
    return [name for name in (part.strip() for part in (names or "").split(",")) if name]


def get_target_step(target: Target, events: RunEvents) -> int | None:
    """Return the step of a checkpoint; an export is taken to be of the run's last one."""
    return events.last_step() if target.step is None else target.step
