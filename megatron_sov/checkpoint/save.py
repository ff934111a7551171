"""Save checkpoints while training continues: copy, write in threads, publish once every rank has written.

    begin       every process copies its blocks and continues training (no copy on CPUs if the run waits)
    writing     threads of every process write, sync and hash files; threads never use collectives
    written     all processes have written: known from the all-reduce at the end of a training step
    completing  a thread of rank 0 merges the indices, writes the manifest, renames the folder and deletes old
                checkpoints
    completed   known from the all-reduce at the end of a later step
"""

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
    MANIFEST, ArtifactWriter, check_output_folder, format_json, publish_folder, write_atomically)
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.checkpoint.host_snapshot import INDICES, HostSnapshot, SnapshotRecord
from megatron_sov.checkpoint.sharded_tensors import write_index
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import broadcast_object, gather_objects, sum_dict
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.runs.checkpoints import (
    ADAPTER, BASE, CHECKPOINT_KIND, MODEL, STATE_FILE, AdapterBase, temporary_folder)

SAVE_TIMEOUT_S = 1800.0
"""Default for `train.save_timeout_s`."""
_POLL_INTERVAL_S = 0.02
PROGRESS = ("written", "completed", "failed", "late")
"""Counters of the save in progress, summed over processes after each step (`CheckpointSaver.progress`)."""
FINISH_TIMEOUT_S = 60.0
"""Time for a pending checkpoint to complete after an error has ended the training."""
IDLE_LIMIT_S = 1.0
"""Seconds without a new byte after which other processes are assumed dead."""
EXIT_TIMEOUT_S = 30.0
"""Time to exit normally when a file system hangs; then the process is ended with `os._exit`."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A completed checkpoint."""

    path: Path
    """Checkpoint folder."""
    step: int
    """Completed optimizer steps."""
    stall_s: float
    """Seconds without training on this process: the copy, and waiting for an unfinished checkpoint."""
    save_s: float
    """Time from the copy to completion."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """Files and metadata that a checkpoint holds in addition to tensors; equal on every process."""

    state: dict[str, Any]
    """Training loop state as JSON values; includes `step` and `tokens`."""
    settings: dict[str, Any]
    """The run's config."""
    tokenizer: Path | None
    """Tokenizer folder to copy."""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> content: files that replace or extend the tokenizer folder's files."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Additional manifest entries."""


class CheckpointSaver:
    """Writes a run's checkpoints, one at a time. Except for `progress`, methods are collective."""

    def __init__(self, on_saved: Callable[[SavedCheckpoint], None] | None = None,
                 timeout_s: float = SAVE_TIMEOUT_S) -> None:
        self._on_saved, self._timeout_s = on_saved, timeout_s
        self._snapshot = HostSnapshot()
        self._pending: _PendingSave | None = None
        # every rank needs the same temporary folder name, different from the folder of a killed run
        self._token = broadcast_object(secrets.token_hex(4))

    def begin(self, path: Path, model: LanguageModel, optimizer: Optimizer | None,
              companions: CheckpointMetadata, on_complete: Callable[[], None] | None = None, *,
              wait: bool = False) -> None:
        """Copy this process's blocks and start writing; first waits for the previous checkpoint.

        Args:
            path: folder of the checkpoint; must not exist.
            model: source of the weights.
            optimizer: source of moments and master weights; None saves weights only.
            companions: metadata and additional files.
            on_complete: called on a thread of rank 0 after completion.
            wait: True promises that `finish` runs before any tensor changes, so that a CPU needs no copy.

        Raises:
            UserError: the previous checkpoint failed.
        """
        # The snapshot reuses the memory of the previous checkpoint.
        self.finish()
        save = _PendingSave(path, temporary_folder(path, self._token), companions.state["step"],
                               time.monotonic())
        sources = _collect_weights(model) | ({"optimizer": optimizer.state_shards()} if optimizer else {})
        # serialize now: the training loop changes the values while the thread writes
        parts, state, base = list(sources), format_json(companions.state), model.adapter_base
        self._snapshot.copy_blocks(sources, tensors_change=not wait)
        rank = dist.get_rank()

        def write_files() -> None:
            with _convert_os_errors(path, rank):
                if rank == 0:
                    check_output_folder(path, CHECKPOINT_KIND, overwrite=False)
                save.folder.mkdir(parents=True, exist_ok=True)
                self._snapshot.write(save.folder, rank)

        def publish_files() -> None:
            with _convert_os_errors(path, rank):
                _publish_checkpoint(save, parts, state, companions, base)
                if on_complete is not None:
                    on_complete()

        save.complete = publish_files
        save.stall_s = time.monotonic() - save.began_s
        save.start_thread(write_files, lambda: setattr(save, "written", True))
        self._pending = save

    def progress(self) -> dict[str, float]:
        """Return this process's counters, to be summed over processes for `advance`."""
        save = self._pending
        if save is None:
            return dict.fromkeys(PROGRESS, 0.0)
        # A failed rank reports through a counter: an exception here would leave other ranks in a collective.
        ended = save.problem is not None or save.completed or (save.written and not save.completing)
        save.late = save.late or (not ended and time.monotonic() - save.began_s > self._timeout_s)
        flags = (save.written and save.problem is None, save.completed, save.problem is not None, save.late)
        return {name: float(flag) for name, flag in zip(PROGRESS, flags, strict=True)}

    def advance(self, sums: Mapping[str, float]) -> None:
        """Advance the save once every process has reached the same point.

        Args:
            sums: counters of `progress`, summed over all processes.

        Raises:
            UserError: on every process, if a process could not write or exceeded the timeout. The temporary
                folder is deleted.
        """
        save = self._pending
        if save is None:
            return
        written, completed, failed, late = (round(sums[name]) for name in PROGRESS)
        if late:
            self._raise_timeout(save)
        # Wait until every rank has stopped writing: a late file would recreate the deleted folder.
        elif failed and written + failed == dist.get_world_size():
            self._abort_save(save)
        elif completed:
            self._pending = None
            if self._on_saved is not None:
                self._on_saved(save.summarize())
        # every rank's files are on disk: rank 0 may merge the indices and rename the folder
        elif written == dist.get_world_size() and dist.get_rank() == 0 and not save.completing:
            save.completing = True
            save.start_completing()

    def finish(self) -> None:
        """Wait for an unfinished save. Raises `UserError`: see `advance`."""
        while self._pending is not None:
            waits_since_s = time.monotonic()
            # an iteration is a collective: ranks must iterate equally often
            self._pending.thread.join(_POLL_INTERVAL_S)
            sums = sum_dict(self.progress(), collectives.all_reduce_world)
            self._pending.stall_s += time.monotonic() - waits_since_s
            self.advance(sums)

    def finish_alone(self) -> None:
        """Complete the save in progress after an error has ended the training.

        Uses no collectives, because other processes may be dead. Each process waits for its own files, at
        most `FINISH_TIMEOUT_S`; rank 0 waits for the files of other ranks and completes the checkpoint if
        possible. Raises nothing, so that the error that ended the training is the reported error.
        """
        save, self._pending = self._pending, None
        if save is None:
            return
        end_s = time.monotonic() + FINISH_TIMEOUT_S
        save.thread.join(FINISH_TIMEOUT_S)
        is_completer = dist.get_rank() == 0 and save.written and not save.completing
        if is_completer and _wait_for_ranks(save.folder, end_s):
            save.start_completing()
            save.thread.join(max(0.0, end_s - time.monotonic()))
        if save.completed and self._on_saved is not None:
            self._on_saved(save.summarize())

    def _abort_save(self, save: "_PendingSave") -> None:
        """Delete the temporary folder and raise the first error on every process; no rank may be writing."""
        if dist.get_rank() == 0:
            shutil.rmtree(save.folder, ignore_errors=True)
        self._pending = None
        raise next(p for p in gather_objects(save.problem) if p is not None)

    def _raise_timeout(self, save: "_PendingSave") -> None:
        hanging = [rank for rank, late in enumerate(gather_objects(save.late)) if late]
        self._pending = None
        # A normal exit may hang in the same file system.
        end = threading.Timer(EXIT_TIMEOUT_S, os._exit, (ExitCode.USER_ERROR,))
        end.daemon = True
        end.start()
        ranks = f"rank{'s' if len(hanging) > 1 else ''} {', '.join(map(str, hanging))}"
        raise UserError(f"{save.path}: {ranks} did not finish writing within train.save_timeout_s "
                        f"= {self._timeout_s:g}; check that file system, then continue with --resume from "
                        "the previous checkpoint")


class _PendingSave:
    """An unfinished save on this process."""

    def __init__(self, path: Path, folder: Path, step: int, began_s: float) -> None:
        self.path, self.folder, self.step, self.began_s = path, folder, step, began_s
        self.stall_s = 0.0
        self.written = self.completing = self.completed = self.late = False
        self.problem: Exception | None = None
        self.thread = threading.Thread()
        self.complete: Callable[[], None] = lambda: None

    def start_thread(self, action: Callable[[], None], on_success: Callable[[], None]) -> None:
        """Run `action`, then `on_success`, on a daemon thread; `problem` stores an exception."""

        def run_action() -> None:
            try:
                action()
                on_success()
            except Exception as e:
                self.problem = e

        self.thread = threading.Thread(target=run_action, daemon=True)
        self.thread.start()

    def start_completing(self) -> None:
        """Run `complete` on a daemon thread."""
        self.start_thread(self.complete, lambda: setattr(self, "completed", True))

    def summarize(self) -> SavedCheckpoint:
        """Return the completed checkpoint; its save ends now."""
        return SavedCheckpoint(self.path, self.step, self.stall_s, time.monotonic() - self.began_s)


def _wait_for_ranks(folder: Path, end_s: float) -> bool:
    """Wait for every rank's `SnapshotRecord`; False: files stop growing, or the time runs out."""
    size, grew_s = -1, time.monotonic()
    while not all(SnapshotRecord.file(folder, rank).is_file() for rank in range(dist.get_world_size())):
        now_s = time.monotonic()
        if (found := _count_bytes(folder)) != size:
            size, grew_s = found, now_s
        if now_s - grew_s > IDLE_LIMIT_S or now_s > end_s:
            return False
        time.sleep(0.1)
    return True


def _count_bytes(folder: Path) -> int:
    total_bytes = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed between listing and stat
            total_bytes += file.stat().st_size
    return total_bytes


@contextlib.contextmanager
def _convert_os_errors(path: Path, rank: int) -> Iterator[None]:
    """Convert an `OSError` to a `UserError` that names rank and checkpoint."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: rank {rank} could not write its part of the checkpoint ({e}); "
                        "free some space or choose another --run") from e


def _collect_weights(model: LanguageModel) -> dict[str, list[LocalShard]]:
    """Return part -> blocks to save: the weights, or for a frozen model the adapter alone. Raises
    `UserError`: the frozen weights are not from a checkpoint."""
    if not model.lora.on:
        return {MODEL: list_local_shards(model, rounded=True)}
    if model.adapter_base is None:
        raise UserError(f"lora.rank = {model.lora.rank}: the frozen weights are not from a checkpoint, so "
                        "the adapter would be unusable; start --from a checkpoint")
    return {ADAPTER: [block for block in list_local_shards(model) if block.key.startswith(PREFIX)]}


def _publish_checkpoint(save: _PendingSave, parts: list[str], state: str, companions: CheckpointMetadata,
                        base: AdapterBase | None) -> None:
    """Merge the processes' indices, add companion files and the manifest, and publish the folder."""
    folder = save.folder
    records = [SnapshotRecord.read(folder, rank) for rank in range(dist.get_world_size())]
    for part in parts:
        write_index(folder, part, [index for record in records for index in record.indices[part]])
    shutil.rmtree(folder / INDICES)
    if companions.tokenizer is not None:
        shutil.copytree(companions.tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns(MANIFEST))
        for name, content in companions.tokenizer_files.items():
            write_atomically(folder / "tokenizer" / name, content)
    write_atomically(folder / STATE_FILE, state)
    artifact = ArtifactWriter(folder, CHECKPOINT_KIND)
    # files were hashed during the write and are not read again
    artifact.hashed_files = {name: file for record in records for name, file in record.files.items()}
    artifact.content = {"step": companions.state["step"], "tokens": companions.state["tokens"],
                        "parts": parts, **({BASE: base.to_dict()} if base is not None else {}),
                        **companions.content}
    artifact.settings = companions.settings
    artifact.complete()
    # The rename is the commit: until now no folder has the name of the checkpoint.
    publish_folder(folder, save.path)
