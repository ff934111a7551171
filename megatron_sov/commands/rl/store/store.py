"""Options for `megatron-sov rl store show | gc STORE`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import ActionGroup, DeclaredCommand, Flag
from megatron_sov.rollouts.rows import parse_round_range

RUN_MODULE = "megatron_sov.commands.rl.store.store_run"


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Rollout store that a command reads."""

    store: Annotated[Path, Flag("STORE")]
    """Folder passed as --store to `rl run`."""


@dataclass(frozen=True, kw_only=True)
class StoreShowOptions(StoreOptions):
    """Print a row with its rewards."""

    part: Annotated[str, Flag("PART")]
    """Part name, e.g. round-0001-piece-0000."""
    row: Annotated[int, Flag("ROW")]
    """Row in the part, from 0."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class StoreGcOptions(StoreOptions):
    """Delete leftovers from killed jobs, claims on finished work, and the named rewards or rounds."""

    version: Annotated[tuple[str, ...], Flag(value="V")] = ()
    """Also delete the rewards with this version; may be repeated."""
    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Also delete these rounds and their rewards."""
    yes: bool = False
    """Confirm --rounds, which otherwise deletes nothing."""


@dataclass(frozen=True)
class StoreGcRequest:
    """Checked input for `store_run.clean_store`."""

    options: StoreGcOptions
    rounds: range
    """Rounds to delete, from 1; may be empty."""


def check_gc(options: StoreGcOptions) -> StoreGcRequest:
    rounds = range(0) if options.rounds is None else parse_round_range(options.rounds)
    return StoreGcRequest(options, rounds)


STORE = ActionGroup({
    "show": DeclaredCommand(StoreShowOptions, run_function=f"{RUN_MODULE}:show_row"),
    "gc": DeclaredCommand(StoreGcOptions, check_gc, f"{RUN_MODULE}:clean_store")})
