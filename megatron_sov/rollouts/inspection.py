"""How `inspect` looks into a store: its parts and claims; and whether bytes, rows, keys, and rewards of
existing rows are sound, one piece in memory at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_size
from megatron_sov.rollouts.rows import UNFINISHED, Key, Rollout, RolloutPart
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.inspection import ArtifactKind
from megatron_sov.work.progress.locks import list_holders
from megatron_sov.work.progress.progress_bar import create_bar

_ROW = np.dtype([("key", "<u8", 2), ("attempt", np.int32), ("is_unfinished", bool),
                 ("part", np.int32), ("row", np.int32)])
"""What is kept of a row while others are read: 29 bytes."""


@dataclass
class StoreCheck:
    """What was looked at, and what is wrong with it."""

    parts: int = 0
    rows: int = 0
    rewards: int = 0
    problems: list[str] = field(default_factory=list)
    """One sentence each, which names the part and the row."""


def check(store: RolloutStore, done: Callable[[int], object] = lambda parts: None) -> StoreCheck:
    found = StoreCheck()
    parts = store.parts(refused=found.problems.append)
    # heads of all rows, a few bytes each, are all that is in memory of the parts before
    kept: list[np.ndarray] = []
    for number, part in enumerate(parts):
        try:
            rows, problems = store.read_all(part.name)
        except UserError as e:
            found.problems.append(str(e))
            continue
        # runs before `continue` too: a part that cannot be read is still a step of the bar
        finally:
            done(1)
        found.parts, found.rows = found.parts + 1, found.rows + len(rows)
        found.problems += [f"{part.file}: row {i} {problem}" for i, problem in enumerate(problems) if problem]
        kept.append(_heads(rows, number))
    found.problems += _key_problems(np.concatenate([np.zeros(0, _ROW), *kept]), parts)
    for version in store.versions():
        for part in store.parts(version=version, refused=found.problems.append):
            found.problems += _reward_problems(store, part, found)
            done(1)
    return found


def _heads(rows: list[Rollout], number: int) -> np.ndarray:
    heads = np.zeros(len(rows), _ROW)
    # keys as 128-bit digests: they only have to be equal or not
    heads["key"] = np.frombuffer(b"".join(_digest(row.key) for row in rows), "<u8").reshape(-1, 2)
    heads["attempt"] = [row.attempt for row in rows]
    heads["is_unfinished"] = [row.finish_reason == UNFINISHED for row in rows]
    heads["part"], heads["row"] = number, np.arange(len(rows))
    return heads


def _digest(key: Key) -> bytes:
    return hashlib.blake2b(repr(tuple(key)).encode(), digest_size=16).digest()


def _key_problems(heads: np.ndarray, parts: list[RolloutPart]) -> list[str]:
    """Return a sentence for each key whose attempts are not 0, 1, ... behind unfinished ones."""
    # lexsort takes its last key first: equal keys lie together, each group by attempt
    heads = heads[np.lexsort((heads["attempt"], *heads["key"].T))]
    follows = np.append([False], (heads["key"][1:] == heads["key"][:-1]).all(1))[:len(heads)]
    before = np.concatenate([heads[:1], heads[:-1]])
    # compared with its neighbour alone, a row breaks at most one of the three rules
    twice = follows & (heads["attempt"] == before["attempt"])
    behind = follows & (heads["attempt"] == before["attempt"] + 1)
    begins = ~follows & (heads["attempt"] == 0)
    wrong = {"has the key and the attempt of": twice,
             "goes on behind an attempt that is not there": ~(twice | behind | begins),
             "goes on behind a finished one:": behind & ~before["is_unfinished"]}
    return [f"{_place(heads[i], parts)} {what}"
            + (f" {_place(before[i], parts)}" if follows[i] and "not there" not in what else "")
            for what, where in wrong.items() for i in np.flatnonzero(where)]


def _place(head: np.void, parts: list[RolloutPart]) -> str:
    return f"{parts[int(head['part'])].file}: row {int(head['row'])}"


def _reward_problems(store: RolloutStore, part: RolloutPart, found: StoreCheck) -> list[str]:
    """Return a sentence for each reward that is none of a row of the part that it judges."""
    try:
        said = store.read_rewards(part.version, part.name)
        rows, _ = store.read_all(part.name, ())
    except UserError as e:
        return [f"{part.path}: judges rows that cannot be read: {e}"
                # rows that are gone altogether need a sentence of their own; other errors name the file
                # themselves
                if not store.part_path(part.name).exists() else str(e)]
    found.parts, found.rewards = found.parts + 1, found.rewards + len(said)
    there, seen, problems = {(row.key, row.attempt) for row in rows}, set(), []
    for i, judged in enumerate(said):
        head = (judged.key, judged.attempt)
        if head not in there:
            problems.append(f"{part.file}: row {i} judges sample {judged.key.sample} of prompt "
                            f"{judged.key.prompt}, attempt {judged.attempt}, which {part.name} does not hold")
        if head in seen:
            problems.append(f"{part.file}: row {i} judges a row a second time")
        seen.add(head)
    return problems


# What commands tell of a store.


def listed(store: RolloutStore) -> Iterator[str]:
    """Yield a line for each part of a store, their sum, and a line for each claim."""
    judged = judged_by(store)
    parts = store.parts()
    for part in parts:
        yield (f"{part.name:<33} {part.num_rows:>9,} rows {format_size(part.file.stat().st_size):>9}  "
               f"{when(part.created_s)}  judged by {', '.join(judged.get(part.name, [])) or 'none'}"
               + (f", {part.num_excluded:,} rows kept out" if part.num_excluded else ""))
    yield f"{store.path}: {len(parts):,} parts, {sum(part.num_rows for part in parts):,} rows"
    # who works on what is not there yet
    for holder in list_holders(store.claims):
        if holder.is_released:
            continue
        where = f"process {holder.pid} on {holder.host or 'a machine that it does not name'}"
        job = f", Slurm job {holder.slurm_job}" if holder.slurm_job else ""
        yield f"claimed: {holder.name} by {where}{job}, last sign of life {when(holder.changed_s)}"


def judged_by(store: RolloutStore, round_: int | None = None) -> dict[str, list[str]]:
    """Return part -> versions of the rewards that have judged it."""
    found: dict[str, list[str]] = {}
    for version in store.versions():
        for part in store.parts(round_, version):
            found.setdefault(part.name, []).append(part.version)
    return found


def when(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    except (ValueError, OverflowError, OSError):  # a stranger's number
        return str(time_s)


def checked(store: RolloutStore) -> StoreCheck:
    """Return what is wrong with a store, behind a bar."""
    with create_bar("read", len(list((store.path / store.ROWS).iterdir())), "part") as bar:
        return check(store, bar.update)


KIND = ArtifactKind(lambda path: listed(RolloutStore.open(path)),
                    lambda path: checked(RolloutStore.open(path)).problems)
"""How `inspect` looks into a store."""
