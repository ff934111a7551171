"""`megatron-sov rl store ls | show | stats | verify | gc STORE`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.errors import ExitCode, GateFailed, UserError, visible
from megatron_sov.base.figures import format_size
from megatron_sov.base.settings import Actions, Flag, add_actions, run_action
from megatron_sov.rollouts.prompts import rounds_between
from megatron_sov.runs.inspecting import MAX_PROBLEMS
from megatron_sov.work.progress.progress_bar import work_bar

if TYPE_CHECKING:
    from megatron_sov.rollouts.rows import Rollout
    from megatron_sov.rollouts.store import RolloutStore

@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store is looked at."""

    store: Annotated[Path, Flag("STORE")]
    """Folder of the store."""


@dataclass(frozen=True, kw_only=True)
class StoreVerifyOptions(StoreOptions):
    """Check bytes, rows, keys and rewards; exit code 3 where one is wrong."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class StoreLsOptions(StoreVerifyOptions):
    """List the parts, who judged them, and who works on what."""

    round: Annotated[int | None, Flag(value="R")] = None
    """Of this round alone."""


@dataclass(frozen=True, kw_only=True)
class StoreStatsOptions(StoreLsOptions):
    """Print figures by round and by domain."""


@dataclass(frozen=True, kw_only=True)
class StoreShowOptions(StoreVerifyOptions):
    """Print one row with its rewards."""

    part: Annotated[str, Flag("PART")]
    """Name of the part, e.g. round-0001-piece-0000."""
    row: Annotated[int, Flag("ROW")]
    """Its row, from 0."""


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


def _ls(args: StoreLsOptions) -> int:
    from megatron_sov.rollouts.inspection import held, judged_by, listed

    store = open_store(args.store)
    if args.json:
        judged = judged_by(store, args.round)
        print(json.dumps({"tokenizer": store.tokenizer_digest, "vocab_size": store.vocab_size, "parts": [
            {"name": part.name, "round": part.round, "piece": part.piece, "attempt": part.attempt,
             "rows": part.num_rows, "kept_out": part.num_kept_out, "bytes": part.file.stat().st_size,
             "created_s": part.created_s, "manifest_sha256": part.manifest_sha256,
             "reward_versions": judged.get(part.name, []), "provenance": part.provenance} for part in
            store.parts(args.round)], "claims": [vars(holder) for holder in held(store)]}))
        return ExitCode.OK
    for line in listed(store, args.round):
        print(visible(line))
    return ExitCode.OK


def _show(args: StoreShowOptions) -> int:
    from megatron_sov.rollouts.inspection import judged_by

    store = open_store(args.store)
    if store.key_of(args.part) is None or not store.has(args.part):
        raise UserError(f"PART {args.part!r}: {args.store} has no such part (`megatron-sov rl store ls` "
                        "lists them)")
    rows, problems = store.read_all(args.part)
    if not 0 <= args.row < len(rows):
        raise UserError(f"ROW {args.row}: {args.part} has {len(rows):,} rows, which are numbered from 0")
    row = rows[args.row]
    said = [judged for version in judged_by(store, row.round).get(args.part, ())
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
    from megatron_sov.rollouts.inspection import when

    times = {"began_s": "began", "ended_s": "ended"}
    for name, value in found.items():
        if name in times:
            yield f"{times[name]}: {when(value)}"
        elif name in ("turns", "rewards"):
            yield f"{name}: {len(value)}"
            yield from (visible(f"  {json.dumps(item, ensure_ascii=False)}") for item in value)
        elif name == "response":
            yield "response:"
            yield visible(value)
        elif value not in (None, ""):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            # a line each: a value with a line break would look like the next field
            yield visible(f"{name}: {shown}").replace("\n", "\\n")


def _stats(args: StoreStatsOptions) -> int:
    from megatron_sov.rollouts.inspection import figures_of

    store = open_store(args.store)
    with work_bar("read", len(store.parts(args.round)), "part") as bar:
        found = figures_of(store, args.round, bar.update)
    if args.json:
        print(json.dumps(found))
        return ExitCode.OK
    for number, figures in found.items():
        print(f"round {number}: {figures['parts']:,} parts, {figures['kept_out']:,} rows kept out, "
              f"{figures['replaced']:,} replaced by a later attempt")
        _tell("all", figures)
        for name, of_domain in figures["domains"].items():
            if len(figures["domains"]) > 1 or name:
                _tell(name or "(no domain)", of_domain)
    if not found:
        print(f"{args.store}: no parts" + (f" of round {args.round}" if args.round is not None else ""))
    return ExitCode.OK


def _tell(name: str, figures: dict[str, Any]) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in figures["finish_reasons"].items())
    print(visible(f"  {name}: {figures['rows']:,} rows of {figures['prompts']:,} prompts ({reasons})"))
    if not figures["rows"]:
        return
    print(f"    tokens: {figures['prompt_tokens']:,} of prompts, {figures['tokens']:,} behind them, "
          f"{figures['written_tokens']:,} of those written by a policy; mean {figures['mean_length']:.1f}, "
          f"longest {figures['longest']:,}")
    if figures["newest_version"] is not None:
        print(f"    written by steps {figures['oldest_version']:,} to {figures['newest_version']:,}, on "
              f"average {figures['mean_steps_behind_newest']:.2f} behind the newest")
    for version, said in figures["rewards"].items():
        mean = "none" if said["mean"] is None else f"{said['mean']:.4f} of {said['rewards']:,}"
        statuses = ", ".join(f"{count:,} {status}" for status, count in said["statuses"].items())
        print(visible(f"    reward {version}: mean {mean} ({statuses})"))


def _verify(args: StoreVerifyOptions) -> int:
    from megatron_sov.rollouts.inspection import checked

    found = checked(open_store(args.store))
    if args.json:
        print(json.dumps(vars(found)))
    for problem in found.problems[:0 if args.json else MAX_PROBLEMS]:
        print(visible(problem))
    if found.problems:
        raise GateFailed(f"{args.store}: {len(found.problems):,} problems in {found.parts:,} parts")
    if not args.json:
        print(f"{args.store}: {found.parts:,} parts, {found.rows:,} rows, {found.rewards:,} rewards: all as "
              "they should be")
    return ExitCode.OK


def _gc(args: StoreGcOptions) -> int:
    from megatron_sov.work.tables.table import clear

    store = open_store(args.store)
    folders = store.versions()
    for version in args.version:
        if not any(version.startswith(folder) for folder in folders):
            raise UserError(f"--version {version}: {args.store} has no rewards of it (there are: "
                            f"{', '.join(folders) or 'none'})")
    found = store.clearable(args.version, () if args.rounds is None else rounds_between(args.rounds))
    # responses cannot be written again by another command: they need a second word
    waits = args.rounds is not None and not args.yes
    if not waits:
        clear(found)
    for item in found:
        print(visible(f"{'would delete' if waits else 'deleted'} {item.path} "
                      f"({format_size(item.size_bytes)}): "
                      f"{item.why}"))
    total = f"{len(found):,} folders, {format_size(sum(item.size_bytes for item in found))}"
    if waits:
        raise UserError(f"--rounds {args.rounds}: nothing is deleted of {total}; add --yes if these "
                        "responses may go, which no other command can write again")
    print(f"{args.store}: deleted {total}")
    return ExitCode.OK


ACTIONS: Actions = {"ls": (StoreLsOptions, _ls), "show": (StoreShowOptions, _show),
                    "stats": (StoreStatsOptions, _stats),
                    "verify": (StoreVerifyOptions, _verify), "gc": (StoreGcOptions, _gc)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
