"""Runs `megatron-sov rl store show | gc`."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.figures import format_size
from megatron_sov.commands.rl.store.store import StoreGcRequest, StoreShowOptions
from megatron_sov.rollouts.inspection import find_reward_versions, format_time
from megatron_sov.rollouts.rows import RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.work.tables.table import delete_folders

TIMES = {"began_s": "began", "ended_s": "ended"}
"""Field with a Unix time -> label."""


def show_row(options: StoreShowOptions) -> None:
    """Print a row with its rewards."""
    store = RolloutStore.open(options.store)
    if store.key_of(options.part) is None or not store.has_part(options.part):
        raise UserError(f"PART {options.part!r}: {options.store} has no such part (`megatron-sov inspect` "
                        "lists parts)")
    rows, problems = store.read_rows_with_problems(options.part)
    if not 0 <= options.row < len(rows):
        raise UserError(f"ROW {options.row}: {options.part} has {len(rows):,} rows, which are numbered "
                        "from 0")
    row = rows[options.row]
    rewards = [reward for version in find_reward_versions(store, row.round).get(options.part, ())
               for reward in store.read_rewards(version, options.part)
               if (reward.key, reward.attempt) == (row.key, row.attempt)]
    fields = _describe_row(row, problems[options.row], rewards)
    print(json.dumps(fields) if options.json else "\n".join(_format_lines(fields)))


def _describe_row(row: Rollout, problem: str, rewards: list[RewardRow]) -> dict[str, Any]:
    return {
        **row.key._asdict(), "round": row.round, "attempt": row.attempt, "problem": problem,
        "finish_reason": row.finish_reason, "prompt_tokens": len(row.prompt_tokens),
        "tokens": len(row.tokens), "temperature": row.temperature, "engine": row.engine,
        "began_s": row.began_s, "ended_s": row.ended_s,
        "turns": [_describe_turn(row, start, end) for start, end in row.spans],
        "routes": None if row.routes is None else list(row.routes.shape), "outcome": row.outcome,
        "rewards": [{"reward_version": reward.reward_version, "reward": reward.reward,
                     "status": reward.status, "components": reward.components, "reason": reward.reason}
                    for reward in rewards],
        "record": row.record, "response": row.response}


def _describe_turn(row: Rollout, start: int, end: int) -> dict[str, Any]:
    mean = float(row.logprobs[start:end].sum()) / (end - start)
    return {"tokens": [start, end], "versions": sorted(set(row.versions[start:end].tolist())),
            "mean_logprob": mean}


def _format_lines(fields: dict[str, Any]) -> Iterator[str]:
    """Yield a line per field; `response`, the longest field, comes last."""
    for name, value in fields.items():
        if name in TIMES:
            yield f"{TIMES[name]}: {format_time(value)}"
        elif name in ("turns", "rewards"):
            yield f"{name}: {len(value)}"
            yield from (escape_controls(f"  {json.dumps(item, ensure_ascii=False)}") for item in value)
        elif name == "response":
            yield "response:"
            yield escape_controls(value)
        elif value not in (None, ""):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            # A line break inside a value would look like the next field.
            yield escape_controls(f"{name}: {text}").replace("\n", "\\n")


def clean_store(request: StoreGcRequest) -> None:
    """Delete unused folders in `options.store`."""
    options = request.options
    store = RolloutStore.open(options.store)
    folders = store.versions()
    for version in options.version:
        if not any(version.startswith(folder) for folder in folders):
            raise UserError(f"--version {version}: {options.store} has no rewards with this version "
                            f"(versions: {', '.join(folders) or 'none'})")
    items = store.clearable(options.version, request.rounds)
    # Deleted responses cannot be generated again, so --rounds needs a confirmation.
    is_unconfirmed = options.rounds is not None and not options.yes
    if not is_unconfirmed:
        delete_folders(items)
    action = "would delete" if is_unconfirmed else "deleted"
    for item in items:
        print(escape_controls(f"{action} {item.path} ({format_size(item.size_bytes)}): {item.why}"))
    total = f"{len(items):,} folders, {format_size(sum(item.size_bytes for item in items))}"
    if is_unconfirmed:
        raise UserError(f"--rounds {options.rounds}: would delete {total}, which no command can restore; add "
                        "--yes to confirm")
    print(f"{options.store}: deleted {total}")
