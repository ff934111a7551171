"""Outputs that are made in parts: a killed command goes on, and makes no finished part again.

A part is a folder named by a hash of all that it depends on: the same command, and one with more input or
other settings, takes those that fit and makes the rest.

An artifact that is made file by file has a journal in its work folder, with the size and hash of every file
that is on disk, and `content/`, which becomes the output by a rename when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    ArtifactWriter, FileRecord, clear_leftovers, disk_errors, new_folder, publish, refuse_existing)
from megatron_sov.base.outputs import behind_links
from megatron_sov.version import __version__
from megatron_sov.work.progress.journal import (
    Journal, begin_journal, begun, delete_work, open_journal, work_folder)

CONTENT = "content"


class ResumableArtifact:
    """An artifact under construction; obtained from `resumable_artifact`."""

    def __init__(self, writer: ArtifactWriter, journal: Journal) -> None:
        self.writer = writer
        """Takes contents, settings and inputs."""
        self._journal, self._lock = journal, threading.Lock()
        self.finished: dict[str, FileRecord] = {}
        """Files that need not be made again."""
        # by size alone: hashes were taken when the files were synced, and are checked by whoever reads them
        for name, record in journal.records():
            file, noted = self.path / str(name), FileRecord.read(json.loads(record))
            if file.is_file() and file.stat().st_size == noted.size_bytes:
                self.finished[str(name)] = noted
        # a file without a record may be torn
        for file in [p for p in self.path.rglob("*") if p.is_file()]:
            if file.relative_to(self.path).as_posix() not in self.finished:
                file.unlink()

    @property
    def path(self) -> Path:
        return self.writer.path

    def finish(self, name: str, record: FileRecord) -> None:
        """Note, from any thread, that a file is complete and synced; `name` is relative to the artifact."""
        with self._lock:
            # after the sync of the file: a record promises that its bytes are on the disk
            self._journal.add([(name, json.dumps(dataclasses.asdict(record)).encode())])
            self.finished[name] = record


@contextlib.contextmanager
def resumable_artifact(path: Path, kind: str, made_by: str, plan: dict[str, Any], *, overwrite: bool = False,
                       redo: bool = False) -> Iterator[ResumableArtifact]:
    """Make an artifact that appears under `path` only when complete; a killed one goes on where it was.

    Args:
        path: the folder that will hold the artifact.
        kind: the manifest's kind.
        made_by: the command, as it is typed.
        plan: JSON values that decide every byte of the files.
        overwrite: replace an artifact of the same kind that is already there.
        redo: begin anew where files have been finished to another plan.

    Raises:
        UserError: `path` exists and may not be replaced, another process is making it, files have been
            finished to another plan, or the disk refuses.
    """
    path = behind_links(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        refuse_existing(path, kind, overwrite)
        # the version too: another one may write other bytes for the same plan
        identity = {"kind": kind, "version": __version__, **plan}
        with open_journal(path, made_by, identity, redo=redo) as journal:
            content = journal.folder / CONTENT
            content.mkdir(exist_ok=True)
            artifact = ResumableArtifact(ArtifactWriter(content, kind), journal)
            yield artifact
            artifact.writer.known_files |= artifact.finished
            artifact.writer.complete()
            publish(content, path)


def part_folder(work: Path, key: str) -> Path:
    """Return the place of a part; sub-folders keep each listing short."""
    return work / key[:2] / key


def make_part(work: Path, key: str, told_in: str, make: Callable[[Path], object]) -> tuple[Path, bool]:
    """Return the folder of a part, and whether it was made now and not complete from before.

    Args:
        work: folder of all parts.
        key: hash of all that the part depends on.
        told_in: a file that a complete part has.
        make: fills the folder that it is called with.
    """
    folder = part_folder(work, key)
    if (folder / told_in).is_file():
        return folder, False
    # two jobs may make the same part; equal keys make equal parts, so the first stays
    with new_folder(folder, first_stays=True) as temporary:
        make(temporary)
    return folder, True


@contextlib.contextmanager
def open_parts(output: Path, made_by: str) -> Iterator[Path]:
    """Give the folder of an output's parts, and delete it at the end, unless an error ends it.

    Args:
        output: what is to be made.
        made_by: the command, as it is typed.

    Raises:
        UserError: another process works on it, the parts are another command's, or nothing can be written.
    """
    with begun(output, made_by, {"command": made_by}):
        # deleted only after a success: an error leaves the parts for the next try
        yield work_folder(output)
        delete_work(output)


def begin_parts(output: Path, made_by: str) -> None:
    """Begin the parts of an output for jobs that make some of them; arguments and errors as of
    `open_parts`."""
    begin_journal(output, made_by, {"command": made_by})
