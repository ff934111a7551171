"""An artifact that the ranks of a model make part by part, at whatever layout: the first one has it, and
notes what is finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.mcore.parallel.world import World, on_main
from megatron_sov.work.resumable_artifact import ResumableArtifact


@dataclass(frozen=True)
class ArtifactOnRanks:
    """The artifact as every rank sees it."""

    folder: Path
    """Where its files are written, by whichever rank."""
    finished: frozenset[str]
    """Files that an earlier command has finished."""
    on_main: Callable[[Callable[[ResumableArtifact], None]], None]
    """Has the first rank do something with the artifact; called by all together."""


@contextlib.contextmanager
def artifact_on_ranks(world: World, opened: Callable[[], contextlib.AbstractContextManager[ResumableArtifact]]
                      ) -> Iterator[ArtifactOnRanks]:
    """Give an artifact that the first rank opens; called by all together."""
    with contextlib.ExitStack() as held:
        own: list[ResumableArtifact] = []

        def begin() -> tuple[str, list[str]]:
            own.append(held.enter_context(opened()))
            return str(own[0].path), list(own[0].finished)

        folder, finished = on_main(world, begin)
        yield ArtifactOnRanks(Path(folder), frozenset(finished),
                              lambda do: on_main(world, lambda: do(own[0])))
