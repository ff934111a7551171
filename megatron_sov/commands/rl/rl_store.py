"""`megatron-sov rl store show | gc STORE`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.errors import ExitCode, UserError, escape_controls
from megatron_sov.base.figures import format_size
from megatron_sov.base.settings import Actions, Flag, add_actions, run_action
from megatron_sov.rollouts.prompts import parse_round_range

if TYPE_CHECKING:
    from megatron_sov.rollouts.rows import Rollout
    from megatron_sov.rollouts.store import RolloutStore


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store is looked at."""

    store: Annotated[Path, Flag("STORE")]
    """Folder of the store."""


@dataclass(frozen=True, kw_only=True)
class StoreShowOptions(StoreOptions):
    """Print one row with its rewards."""

    part: Annotated[str, Flag("PART")]
    """Name of the part, e.g. round-0001-piece-0000."""
    row: Annotated[int, Flag("ROW")]
    """Its row, from 0."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class StoreGcOptions(StoreOptions):
    """Delete what killed jobs left, claims on what is done, and what you name."""

    version: Annotated[tuple[str, ...], Flag(value="V")] = ()
    """Also what this version of a reward said; may be repeated."""
    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Also these rounds, with all that was said of them."""
    yes: bool = False
    """--rounds deletes nothing without it."""


def open_store(path: Path) -> RolloutStore:
    from megatron_sov.rollouts.store import RolloutStore

    return RolloutStore.open(path)


def _show(args: StoreShowOptions) -> int:
    from megatron_sov.rollouts.inspection import find_reward_versions

    store = open_store(args.store)
    if store.key_of(args.part) is None or not store.has_part(args.part):
        raise UserError(f"PART {args.part!r}: {args.store} has no such part (`megatron-sov inspect` "
                        "lists them)")
    rows, problems = store.read_rows_with_problems(args.part)
    if not 0 <= args.row < len(rows):
        raise UserError(f"ROW {args.row}: {args.part} has {len(rows):,} rows, which are numbered from 0")
    row = rows[args.row]
    said = [judged for version in find_reward_versions(store, row.round).get(args.part, ())
            for judged in store.read_rewards(version, args.part)
            if (judged.key, judged.attempt) == (row.key, row.attempt)]
    turns = [_turn(row, *span) for span in row.spans]
    found = {**row.key._asdict(), "round": row.round, "attempt": row.attempt, "problem": problems[args.row],
             "finish_reason": row.finish_reason, "prompt_tokens": len(row.prompt_tokens),
             "tokens": len(row.tokens), "temperature": row.temperature, "engine": row.engine,
             "began_s": row.began_s, "ended_s": row.ended_s, "turns": turns,
             "routes": None if row.routes is None else list(row.routes.shape), "outcome": row.outcome,
             "rewards": [{"reward_version": judged.reward_version, "reward": judged.reward,
                          "status": judged.status, "components": judged.components, "reason": judged.reason}
                         for judged in said], "record": row.record, "response": row.response}
    print(json.dumps(found) if args.json else "\n".join(_lines(found)))
    return ExitCode.OK


def _turn(row: Rollout, start: int, end: int) -> dict[str, Any]:
    mean = float(row.logprobs[start:end].sum()) / (end - start)
    return {"tokens": [start, end], "versions": sorted(set(row.versions[start:end].tolist())),
            "mean_logprob": mean}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a row for people; the response, which is the longest, comes last."""
    from megatron_sov.rollouts.inspection import format_time

    times = {"began_s": "began", "ended_s": "ended"}
    for name, value in found.items():
        if name in times:
            yield f"{times[name]}: {format_time(value)}"
        elif name in ("turns", "rewards"):
            yield f"{name}: {len(value)}"
            yield from (escape_controls(f"  {json.dumps(item, ensure_ascii=False)}") for item in value)
        elif name == "response":
            yield "response:"
            yield escape_controls(value)
        elif value not in (None, ""):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            # a line each: a value with a line break would look like the next field
            yield escape_controls(f"{name}: {shown}").replace("\n", "\\n")


def _gc(args: StoreGcOptions) -> int:
    from megatron_sov.work.tables.table import delete_folders

    store = open_store(args.store)
    folders = store.versions()
    for version in args.version:
        if not any(version.startswith(folder) for folder in folders):
            raise UserError(f"--version {version}: {args.store} has no rewards of it (there are: "
                            f"{', '.join(folders) or 'none'})")
    found = store.clearable(args.version, () if args.rounds is None else parse_round_range(args.rounds))
    # responses cannot be written again by another command: they need a second word
    waits = args.rounds is not None and not args.yes
    if not waits:
        delete_folders(found)
    for item in found:
        print(escape_controls(f"{'would delete' if waits else 'deleted'} {item.path} "
                              f"({format_size(item.size_bytes)}): "
                              f"{item.why}"))
    total = f"{len(found):,} folders, {format_size(sum(item.size_bytes for item in found))}"
    if waits:
        raise UserError(f"--rounds {args.rounds}: nothing is deleted of {total}; add --yes if these "
                        "responses may go, which no other command can write again")
    print(f"{args.store}: deleted {total}")
    return ExitCode.OK


ACTIONS: Actions = {"show": (StoreShowOptions, _show), "gc": (StoreGcOptions, _gc)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
