"""Whether all of a store is as it should be: bytes, rows, keys, and rewards of rows that are there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_sov.errors import UserError
from megatron_sov.rollouts.parts import REWARDS, ROLLOUTS, Part, numbers_in, open_part
from megatron_sov.rollouts.rows import UNFINISHED, Key, Rollout
from megatron_sov.rollouts.store import Store

_ROW = np.dtype([("key", "<u8", 2), ("attempt", np.int32), ("is_unfinished", bool),
                 ("part", np.int32), ("row", np.int32)])
"""What is kept of a row while others are read: 29 bytes."""


@dataclass
class Checked:
    """What was looked at, and what is wrong with it."""

    parts: int = 0
    rows: int = 0
    rewards: int = 0
    problems: list[str] = field(default_factory=list)
    """One sentence each, which names the part and the row."""


def check(store: Store, done: Callable[[int], object] = lambda parts: None) -> Checked:
    """Return what is wrong with a store.

    Args:
        store: to look at.
        done: told the number of parts, as they are read.
    """
    found = Checked()
    parts = list(_parts(store, ROLLOUTS, found))
    kept: list[np.ndarray] = []
    for number, part in enumerate(parts):
        try:
            rows, problems = store.read_all(part.name)
        except UserError as e:
            found.problems.append(str(e))
            continue
        finally:
            done(1)
        found.parts, found.rows = found.parts + 1, found.rows + len(rows)
        found.problems += [f"{part.file}: row {i} {problem}" for i, problem in enumerate(problems) if problem]
        kept.append(_heads(rows, number))
    found.problems += _key_problems(np.concatenate([np.zeros(0, _ROW), *kept]), parts)
    for version in store.reward_versions():
        for part in _parts(store, f"{REWARDS}/{version}", found):
            found.problems += _reward_problems(store, part, found)
            done(1)
    return found


def _parts(store: Store, below: str, found: Checked) -> Iterator[Part]:
    """Yield the parts of a folder; what is none is a problem."""
    folder = store.path / below
    for name in sorted(os.listdir(folder), key=lambda name: (numbers_in(name) or (0, 0, 0), name)):
        if not name.startswith("."):
            try:
                yield open_part(folder / name, below.partition("/")[0], store.identity)
            except UserError as e:
                found.problems.append(str(e))


def _heads(rows: list[Rollout], number: int) -> np.ndarray:
    heads = np.zeros(len(rows), _ROW)
    heads["key"] = np.frombuffer(b"".join(_digest(row.key) for row in rows), "<u8").reshape(-1, 2)
    heads["attempt"] = [row.attempt for row in rows]
    heads["is_unfinished"] = [row.finish_reason == UNFINISHED for row in rows]
    heads["part"], heads["row"] = number, np.arange(len(rows))
    return heads


def _digest(key: Key) -> bytes:
    return hashlib.blake2b(repr(tuple(key)).encode(), digest_size=16).digest()


def _key_problems(heads: np.ndarray, parts: list[Part]) -> list[str]:
    """Return a sentence for each key whose attempts are not 0, 1, ... behind unfinished ones."""
    heads = heads[np.lexsort((heads["attempt"], *heads["key"].T))]
    follows = np.append([False], (heads["key"][1:] == heads["key"][:-1]).all(1))[:len(heads)]
    before = np.concatenate([heads[:1], heads[:-1]])
    twice = follows & (heads["attempt"] == before["attempt"])
    behind = follows & (heads["attempt"] == before["attempt"] + 1)
    begins = ~follows & (heads["attempt"] == 0)
    wrong = {"has the key and the attempt of": twice,
             "goes on behind an attempt that is not there": ~(twice | behind | begins),
             "goes on behind a finished one:": behind & ~before["is_unfinished"]}
    return [f"{_place(heads[i], parts)} {what}"
            + (f" {_place(before[i], parts)}" if follows[i] and "not there" not in what else "")
            for what, where in wrong.items() for i in np.flatnonzero(where)]


def _place(head: np.void, parts: list[Part]) -> str:
    return f"{parts[int(head['part'])].file}: row {int(head['row'])}"


def _reward_problems(store: Store, part: Part, found: Checked) -> list[str]:
    """Return a sentence for each reward that is none of a row of the part that it judges."""
    try:
        said = store.read_rewards(part.reward_version, part.name)
        rows, _ = store.read_all(part.name, ())
    except UserError as e:
        return [f"{part.path}: judges rows that cannot be read: {e}"
                if not store.rollouts_path(part.name).exists() else str(e)]
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
