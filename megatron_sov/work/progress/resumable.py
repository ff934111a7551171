"""Outputs built from parts: a killed command resumes without repeating finished parts.

Parts are folders named by a hash of everything they depend on: the same command, or a command with more input
or other settings, reuses matching parts and builds the rest.

An artifact built file by file has a journal in its work folder with size and hash of each synced file, and a
folder `content/` that becomes the output by renaming.
"""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    ArtifactWriter, FileRecord, check_output_folder, clear_leftovers, create_folder, publish_folder,
    translate_disk_errors)
from megatron_sov.base.outputs import resolve_link
from megatron_sov.version import __version__
from megatron_sov.work.progress.journal import (
    Journal, begin_journal, delete_work, lock_work_folder, open_journal, work_folder)

CONTENT = "content"


class ResumableArtifact:
    """An artifact under construction, from `resumable_artifact`."""

    def __init__(self, writer: ArtifactWriter, journal: Journal) -> None:
        self.writer = writer
        """Receives the manifest's contents, settings and inputs."""
        self._journal, self._lock = journal, threading.Lock()
        self.finished: dict[str, FileRecord] = {}
        """Files completed by an earlier command."""
        # Compare sizes only: hashes were computed when the files were synced, and readers check them.
        for name, record in journal.records():
            file, file_record = self.path / str(name), FileRecord.read(json.loads(record))
            if file.is_file() and file.stat().st_size == file_record.size_bytes:
                self.finished[str(name)] = file_record
        # a file without record may be incomplete
        for file in [p for p in self.path.rglob("*") if p.is_file()]:
            if file.relative_to(self.path).as_posix() not in self.finished:
                file.unlink()

    @property
    def path(self) -> Path:
        return self.writer.path

    def finish(self, name: str, record: FileRecord) -> None:
        """Record a complete, synced file (name relative to the artifact); callable from any thread."""
        with self._lock:
            # after the file's fsync: a record promises bytes on disk
            self._journal.add([(name, json.dumps(dataclasses.asdict(record)).encode())])
            self.finished[name] = record


@contextlib.contextmanager
def resumable_artifact(path: Path, kind: str, made_by: str, plan: dict[str, Any], *, overwrite: bool = False,
                       redo: bool = False) -> Iterator[ResumableArtifact]:
    """Build an artifact that appears under `path` when complete; a killed build resumes.

    Args:
        path: folder of the artifact.
        kind: the manifest's kind.
        made_by: command line, for messages.
        plan: JSON values that determine every byte of the files.
        overwrite: replace an existing artifact of the same kind.
        redo: discard files built for another plan.

    Raises:
        UserError: `path` exists and may not be replaced, another process is building it, its files belong to
            another plan, or the disk is not writable.
    """
    path = resolve_link(path)
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        check_output_folder(path, kind, overwrite)
        # different versions may write different bytes for the same plan
        identity = {"kind": kind, "version": __version__, **plan}
        with open_journal(path, made_by, identity, redo=redo) as journal:
            content = journal.folder / CONTENT
            content.mkdir(exist_ok=True)
            artifact = ResumableArtifact(ArtifactWriter(content, kind), journal)
            yield artifact
            artifact.writer.hashed_files |= artifact.finished
            artifact.writer.complete()
            publish_folder(content, path)


def part_folder(work: Path, key: str) -> Path:
    """Return a part's folder; subfolders by prefix keep listings short."""
    return work / key[:2] / key


def build_part(work: Path, key: str, marker: str, build: Callable[[Path], object]) -> tuple[Path, bool]:
    """Return a part's folder, and whether the call built the part.

    Args:
        work: folder of all parts.
        key: hash of everything the part depends on.
        marker: name of a file in every complete part.
        build: fills a new folder.
    """
    folder = part_folder(work, key)
    if (folder / marker).is_file():
        return folder, False
    # if two jobs build the same part, the first stays: equal keys give equal parts
    with create_folder(folder, keep_existing=True) as temporary:
        build(temporary)
    return folder, True


@contextlib.contextmanager
def open_parts(output: Path, made_by: str) -> Iterator[Path]:
    """Yield the folder of an output's parts; delete it at the end unless an exception escapes.

    Args:
        output: path of the output.
        made_by: command line, for messages.

    Raises:
        UserError: another process holds the folder, it belongs to another command, or the disk is not
            writable.
    """
    with lock_work_folder(output, made_by, {"command": made_by}):
        # delete after success only: after an error the next attempt reuses the parts
        yield work_folder(output)
        delete_work(output)


def begin_parts(output: Path, made_by: str) -> None:
    """Create the parts folder of an output before jobs build parts in parallel; see `open_parts`."""
    begin_journal(output, made_by, {"command": made_by})
