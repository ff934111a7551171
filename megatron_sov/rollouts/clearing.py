"""What of a store can go: leftovers of killed jobs, claims on what is done, and what the user names."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.artifacts import MANIFEST, delete_folder, disk_errors, is_held
from megatron_sov.rollouts.parts import REWARDS, ROLLOUTS, numbers_in
from megatron_sov.rollouts.store import VERSION_CHARS, Store

LEFTOVER_S = 3600.0
"""Seconds without a change after which a temporary folder is one that a killed job has left."""


@dataclass(frozen=True)
class Clearable:
    """A folder that can go, and why."""

    path: Path
    why: str
    size_bytes: int


def clearable(store: Store, versions: Collection[str] = (), rounds: Collection[int] = ()) -> list[Clearable]:
    """Return what can go.

    Args:
        store: to look at.
        versions: rewards to let go, by their version or the name of their folder.
        rounds: rounds to let go, with all that was said of them.
    """
    folders = {version[:VERSION_CHARS] for version in versions}
    return [Clearable(path, why, _size_bytes(path)) for path, why in _found(store, folders, rounds)]


def _found(store: Store, folders: set[str], rounds: Collection[int]) -> Iterator[tuple[Path, str]]:
    for path in (*sorted((store.path / REWARDS).iterdir()), *sorted(store.claims.iterdir())):
        if path.name.startswith(".") and _is_left(path):
            yield path, "a killed job left it"
    kept = [folder for folder in store.reward_versions() if folder not in folders]
    for below in (ROLLOUTS, *(f"{REWARDS}/{folder}" for folder in kept)):
        for path in sorted((store.path / below).iterdir()):
            numbers = numbers_in(path.name)
            if path.name.startswith(".") and _is_left(path):
                yield path, "a killed job left it"
            elif numbers is not None and numbers[0] in rounds:
                yield path, f"of round {numbers[0]}"
    for folder in folders & set(store.reward_versions()):
        yield store.path / REWARDS / folder, "of that version"
    for path in sorted(store.claims.iterdir()):
        if not path.name.startswith(".") and (_claimed(store, path.name) / MANIFEST).is_file():
            yield path, "what it claims is done"


def _claimed(store: Store, claim: str) -> Path:
    """Return the part that a claim is on: NAME, or reward-VERSION-NAME for what a reward says of it."""
    judged = re.fullmatch(r"reward-([\w-]+?)-(round-.*)", claim)
    return store.path.joinpath(*((REWARDS, judged[1], judged[2]) if judged else (ROLLOUTS, claim)))


def clear(found: Collection[Clearable]) -> None:
    """Delete what can go; what is half deleted has no name that anyone reads.

    Raises:
        UserError: it may not be deleted.
    """
    for item in found:
        hidden = item.path.with_name(f".{item.path.name}.gone-{uuid.uuid4().hex}")
        with disk_errors(item.path), contextlib.suppress(FileNotFoundError):  # another one cleared it
            delete_folder(item.path, hidden)


def _is_left(folder: Path) -> bool:
    """Return whether nobody works in a temporary folder any more, as far as can be known: a writer holds it,
    where the disk knows locks, and changes it all the time."""
    if is_held(folder):
        return False
    try:
        newest_s = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # it is being renamed, or deleted
        return False
    return ".gone-" in folder.name or time.time() - newest_s > LEFTOVER_S


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
