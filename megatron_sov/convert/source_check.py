"""Hashes the files of a source while it is converted, so that neither waits for the other.

Nothing that was made from a damaged file outlives the check: a written file counts as finished only when
those that it was made from are whole, and an artifact appears only when all are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_sov.artifacts import MANIFEST, file_damage, read_manifest
from megatron_sov.convert.adapted_weights import AdaptedWeights
from megatron_sov.convert.sources import PART, Weights
from megatron_sov.errors import UserError
from megatron_sov.pretrained import DAMAGED_HF, listed
from megatron_sov.runs.checkpoints import ADAPTER, KIND, instead_of


class SourceCheck:
    """A check under way; obtained from `checked_source`."""

    def __init__(self, weights: Weights, found: dict[str, Future[str | None]], remedy: str,
                 base: SourceCheck | None) -> None:
        self._weights, self._found, self._remedy, self._base = weights, found, remedy, base

    def require(self, names: Iterable[str]) -> None:
        """Wait until the tensors' files have been looked at.

        Args:
            names: Hugging Face names of tensors.

        Raises:
            UserError: a file is missing or was changed since it was written; the message names it,
                and what it holds.
        """
        names = list(names)
        if self._base is not None:
            self._base.require(names)
        files = {file for name in names for file in self._weights.files_of(name)}
        self._refuse_damage(file for file in self._found if file in files)

    def require_all(self) -> None:
        """Wait until every file has been looked at; `UserError` as `require`."""
        self._refuse_damage(self._found)

    def _refuse_damage(self, files: Iterable[str]) -> None:
        for file in files:
            if problem := self._found[file].result():
                held = self._weights.held_in(file)
                raise UserError(f"{problem}{f' (it holds {listed(held)})' if held else ''}; {self._remedy}")


@contextlib.contextmanager
def checked_source(weights: Weights, workers: int) -> Iterator[SourceCheck]:
    """Check the files that a conversion reads (all but other parts, as the optimizer's) against the
    manifest, where there is one, beside what is done inside.

    Args:
        weights: the source.
        workers: files that are hashed at a time.

    Raises:
        UserError: a file is missing or was changed since it was written; in place of any other error that
            came up inside, which may be its consequence.
    """
    if isinstance(weights, AdaptedWeights):
        with checked_source(weights.base, workers) as base, _checked(weights, workers, base) as check:
            yield check
    else:
        with _checked(weights, workers, None) as check:
            yield check


@contextlib.contextmanager
def _checked(weights: Weights, workers: int, base: SourceCheck | None) -> Iterator[SourceCheck]:
    """Check one folder's files; `base` is the check of what an adapter belongs to."""
    path, pool = weights.path, ThreadPoolExecutor(workers)
    found: dict[str, Future[str | None]] = {}
    remedy = DAMAGED_HF
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        others = tuple(f"{part}/" for part in manifest.content.get("parts", [])
                       if part not in (PART, ADAPTER))
        found = {name: pool.submit(file_damage, path / name, record)
                 for name, record in manifest.files.items() if not name.startswith(others)}
        remedy = instead_of(path) if manifest.kind == KIND else DAMAGED_HF
    check = SourceCheck(weights, found, remedy, base)
    try:
        yield check
        check.require_all()
    except Exception:
        check.require_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
