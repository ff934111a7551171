"""Writing a checkpoint beside the training: copied at once, written by threads,
complete when every process agrees.

    begin      every process copies what it owns and goes on training (where the run waits for the checkpoint,
               a CPU writes from the tensors themselves)
    writing    threads of every process write, sync and hash their files (no collective in any thread)
    agreed     all have written, as the all-reduce at the end of a step tells
    completing a thread of rank 0 merges what was written, writes the manifest,
    renames the folder and deletes old checkpoints
    finished   as the all-reduce at the end of a later step tells
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, atomic_write, publish, refuse_existing, to_json)
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.checkpoint.host_snapshot import INDICES, Snapshot, WrittenSnapshot
from megatron_sov.checkpoint.sharded_tensors import write_index
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import broadcast_object, gather_objects, sum_dict
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.runs.checkpoints import ADAPTER, BASE, KIND, MODEL, STATE, AdapterBase, temporary

SAVE_TIMEOUT_S = 1800.0
_LOOK_EVERY_S = 0.02
PROGRESS = ("written", "completed", "failed", "late")
"""What processes tell one another about the checkpoint that is being written:
each counts those for which it holds."""
FINISH_WITHIN_S = 60.0
"""Time that an outstanding checkpoint has where an error has ended the steps behind it."""
STILL_S = 1.0
"""Time without a new byte after which nobody is taken to write a checkpoint any more."""
LEAVE_WITHIN_S = 30.0
"""Time to leave in good order when a file system hangs; then the process ends at once."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    path: Path
    """Its folder."""
    step: int
    """Optimizer steps before it was taken."""
    stall_s: float
    """Time in which this process did not train: the copy, and waiting where the run could not go on
    without the checkpoint."""
    save_s: float
    """Time from the copy until the checkpoint was there."""


@dataclass(frozen=True)
class Companions:
    """What stands beside the tensors of a checkpoint; the same on every process."""

    state: dict[str, Any]
    """Plain values of the loop; must hold `step` and `tokens`."""
    settings: dict[str, Any]
    """The run's config."""
    tokenizer: Path | None
    """Folder whose files are carried along."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content of files that stand with the tokenizer, in place of those of its folder."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Of the manifest, besides what every checkpoint has."""


class _Writing:
    """The checkpoint that is being written, seen from one process."""

    def __init__(self, path: Path, folder: Path, step: int, began_s: float) -> None:
        self.path, self.folder, self.step, self.began_s = path, folder, step, began_s
        self.stall_s = 0.0
        self.written = self.completing = self.completed = self.late = False
        self.problem: Exception | None = None
        self.thread = threading.Thread()
        self.complete: Callable[[], None] = lambda: None

    def start(self, action: Callable[[], None], done: Callable[[], None]) -> None:
        """Do something in a thread that does not keep the process from ending, and note how it went."""

        def work() -> None:
            try:
                action()
                done()
            except Exception as e:
                self.problem = e

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()


class Saver:
    """Writes the checkpoints of a run, one at a time; every method but `progress` is called by all
    processes together."""

    def __init__(self, on_saved: Callable[[Saved], None] | None = None,
                 timeout_s: float = SAVE_TIMEOUT_S) -> None:
        self._on_saved, self._timeout_s = on_saved, timeout_s
        self._snapshot = Snapshot()
        self._writing: _Writing | None = None
        # one name for the temporary folder on all ranks, and another one than that of a run that was killed
        # here before
        self._token = broadcast_object(secrets.token_hex(4))

    def begin(self, path: Path, model: LanguageModel, optimizer: Optimizer | None, companions: Companions,
              then: Callable[[], None] | None = None, *, waits: bool = False) -> None:
        """Copy what this process owns and start to write it; waits for the checkpoint before.

        Args:
            path: the checkpoint's folder; nothing may be there.
            model: its weights.
            optimizer: its moments and master weights.
            companions: what stands beside them.
            then: called in a thread of rank 0 when the checkpoint is there.
            waits: `finish` is called before any tensor changes, so that a CPU needs no copy.

        Raises:
            UserError: the checkpoint before failed.
        """
        # one checkpoint at a time: the snapshot's memory is that of the one before
        self.finish()
        writing = _Writing(path, temporary(path, self._token), companions.state["step"], time.monotonic())
        sources = _weights(model) | ({"optimizer": optimizer.state_shards()} if optimizer else {})
        # as text now: the loop goes on to change these values while the thread writes
        parts, state, base = list(sources), to_json(companions.state), model.adapter_base
        self._snapshot.take(sources, changes=not waits)
        rank = dist.get_rank()

        def write() -> None:
            with _refusals(path, rank):
                if rank == 0:
                    refuse_existing(path, KIND, overwrite=False)
                writing.folder.mkdir(parents=True, exist_ok=True)
                self._snapshot.write(writing.folder, rank)

        def complete() -> None:
            with _refusals(path, rank):
                _complete(writing, parts, state, companions, base)
                if then is not None:
                    then()

        writing.complete = complete
        writing.stall_s = time.monotonic() - writing.began_s
        writing.start(write, lambda: setattr(writing, "written", True))
        self._writing = writing

    def progress(self) -> dict[str, float]:
        """Return this process's part of what `advance` needs, summed over all."""
        w = self._writing
        if w is None:
            return dict.fromkeys(PROGRESS, 0.0)
        # a failure on one rank is told by its sum; no rank raises on its own, or the others would wait for it
        # in the next collective
        ended = w.problem is not None or w.completed or (w.written and not w.completing)
        w.late = w.late or (not ended and time.monotonic() - w.began_s > self._timeout_s)
        found = (w.written and w.problem is None, w.completed, w.problem is not None, w.late)
        return {name: float(holds) for name, holds in zip(PROGRESS, found, strict=True)}

    def advance(self, sums: Mapping[str, float]) -> None:
        """Take the next step where all processes are ready for it, given `progress` summed over them.

        Raises:
            UserError: on every process; one could not write or did not finish in time,
                and nothing is left under the name.
        """
        w = self._writing
        if w is None:
            return
        written, completed, failed, late = (round(sums[name]) for name in PROGRESS)
        if late:
            self._give_up(w)
        # not before every rank has ended writing: the folder is deleted next, and a late file would come back
        # into it
        elif failed and written + failed == dist.get_world_size():
            self._fail(w)
        elif completed:
            self._writing = None
            if self._on_saved is not None:
                self._on_saved(Saved(w.path, w.step, w.stall_s, time.monotonic() - w.began_s))
        # all files of all ranks are on disk: only then rank 0 may merge indices and give the folder its name
        elif written == dist.get_world_size() and dist.get_rank() == 0 and not w.completing:
            w.completing = True
            w.start(w.complete, lambda: setattr(w, "completed", True))

    def finish(self) -> None:
        """Wait for the outstanding checkpoint, if there is one.

        Raises:
            UserError: as `advance`.
        """
        while self._writing is not None:
            waits_since_s = time.monotonic()
            # every rank goes round as often as the others, since each round is a collective
            self._writing.thread.join(_LOOK_EVERY_S)
            sums = sum_dict(self.progress(), collectives.all_reduce_world)
            self._writing.stall_s += time.monotonic() - waits_since_s
            self.advance(sums)

    def finish_alone(self) -> None:
        """Let the outstanding checkpoint become complete where an error has ended the steps behind it.

        No collective: other processes may be gone.  Each one sees its own files written before it leaves, for
        `FINISH_WITHIN_S` at most; rank 0 looks for those of the others and completes what is whole.  Nothing
        is raised: the error that ended the steps is what has to be told.
        """
        w, self._writing = self._writing, None
        if w is None:
            return
        end_s = time.monotonic() + FINISH_WITHIN_S
        w.thread.join(FINISH_WITHIN_S)
        if dist.get_rank() == 0 and w.written and not w.completing and _all_have_written(w.folder, end_s):
            w.start(w.complete, lambda: setattr(w, "completed", True))
            w.thread.join(max(0.0, end_s - time.monotonic()))
        if w.completed and self._on_saved is not None:
            self._on_saved(Saved(w.path, w.step, w.stall_s, time.monotonic() - w.began_s))

    def _fail(self, w: _Writing) -> None:
        """Raise the first problem on every process, when no process writes any more and what was
        written is deleted."""
        if dist.get_rank() == 0:
            shutil.rmtree(w.folder, ignore_errors=True)
        self._writing = None
        raise next(p for p in gather_objects(w.problem) if p is not None)

    def _give_up(self, w: _Writing) -> None:
        hanging = [rank for rank, late in enumerate(gather_objects(w.late)) if late]
        self._writing = None
        # leaving meets the same file system
        end = threading.Timer(LEAVE_WITHIN_S, os._exit, (ExitCode.USER_ERROR,))
        end.daemon = True
        end.start()
        raise UserError(f"{w.path}: rank{'s' if len(hanging) > 1 else ''} {', '.join(map(str, hanging))} did "
                        f"not finish writing within train.save_timeout_s = {self._timeout_s:g}; see what "
                        "holds up that file system, then go on with --resume from the checkpoint before")


def _all_have_written(folder: Path, end_s: float) -> bool:
    """Wait, while a file of the folder grows, until every process has said what it wrote there."""
    size, grew_s = -1, time.monotonic()
    while not all(WrittenSnapshot.file(folder, rank).is_file() for rank in range(dist.get_world_size())):
        now_s = time.monotonic()
        if (found := _bytes_in(folder)) != size:
            size, grew_s = found, now_s
        if now_s - grew_s > STILL_S or now_s > end_s:
            return False
        time.sleep(0.1)
    return True


def _bytes_in(folder: Path) -> int:
    total_bytes = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has got its final name just now
            total_bytes += file.stat().st_size
    return total_bytes


@contextlib.contextmanager
def _refusals(path: Path, rank: int) -> Iterator[None]:
    """Turn what a disk refuses into a `UserError` that names rank and checkpoint."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: rank {rank} could not write its part of the checkpoint ({e}); "
                        "free some space or choose another --run") from e


def _weights(model: LanguageModel) -> dict[str, list[LocalShard]]:
    """Return the blocks of the weights, under the name of their part; beside a frozen model its adapter
    alone.

    Raises:
        UserError: the frozen model is in no checkpoint.
    """
    if not model.lora.on:
        return {MODEL: local_shards(model, rounded=True)}
    if model.adapter_base is None:
        raise UserError(f"lora.rank = {model.lora.rank}: the frozen weights come from no checkpoint, so that "
                        "no adapter of them can be used; start --from one")
    return {ADAPTER: [block for block in local_shards(model) if block.key.startswith(PREFIX)]}


def _complete(writing: _Writing, parts: list[str], state: str, companions: Companions,
              base: AdapterBase | None) -> None:
    """Merge what all processes wrote, write what stands beside it and the manifest,
    and give the folder its name."""
    folder = writing.folder
    written = [WrittenSnapshot.read(folder, rank) for rank in range(dist.get_world_size())]
    for part in parts:
        write_index(folder, part, [index for w in written for index in w.indices[part]])
    shutil.rmtree(folder / INDICES)
    if companions.tokenizer is not None:
        shutil.copytree(companions.tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns(MANIFEST))
        for name, content in companions.beside.items():
            atomic_write(folder / "tokenizer" / name, content)
    atomic_write(folder / STATE, state)
    artifact = ArtifactWriter(folder, KIND)
    # their digests were taken while they were written; nothing is read again
    artifact.known_files = {name: record for w in written for name, record in w.files.items()}
    artifact.content = {"step": companions.state["step"], "tokens": companions.state["tokens"],
                        "parts": parts, **({BASE: base.to_dict()} if base is not None else {}),
                        **companions.content}
    artifact.settings = companions.settings
    artifact.complete()
    # the rename is the commit: before it there is no checkpoint under this name, after it a whole one
    publish(folder, writing.path)
