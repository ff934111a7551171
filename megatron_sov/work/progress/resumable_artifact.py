"""Artifacts that are made file by file: a killed command goes on, and makes no finished file again.

While `OUT` is made, its work folder has a journal, with the size and hash of every file that is on disk, and
`content/`, which becomes `OUT` by a rename when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    ArtifactWriter, FileRecord, clear_leftovers, disk_errors, publish, refuse_existing)
from megatron_sov.base.outputs import behind_links
from megatron_sov.version import __version__
from megatron_sov.work.progress.journal import Journal, open_journal

CONTENT = "content"


class ResumableArtifact:
    """An artifact under construction; obtained from `resumable_artifact`."""

    def __init__(self, writer: ArtifactWriter, journal: Journal) -> None:
        self.writer = writer
        """Takes contents, settings and inputs."""
        self._journal, self._lock = journal, threading.Lock()
        self.finished: dict[str, FileRecord] = {}
        """Files that need not be made again."""
        for name, record in journal.records():
            file, noted = self.path / str(name), FileRecord.read(json.loads(record))
            if file.is_file() and file.stat().st_size == noted.size_bytes:
                self.finished[str(name)] = noted
        for file in [p for p in self.path.rglob("*") if p.is_file()]:
            if file.relative_to(self.path).as_posix() not in self.finished:
                file.unlink()

    @property
    def path(self) -> Path:
        """The folder to write files into."""
        return self.writer.path

    def finish(self, name: str, record: FileRecord) -> None:
        """Note, from any thread, that a file is complete and synced; `name` is relative to the artifact."""
        with self._lock:
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
        identity = {"kind": kind, "version": __version__, **plan}
        with open_journal(path, made_by, identity, redo=redo) as journal:
            content = journal.folder / CONTENT
            content.mkdir(exist_ok=True)
            artifact = ResumableArtifact(ArtifactWriter(content, kind), journal)
            yield artifact
            artifact.writer.known_files |= artifact.finished
            artifact.writer.complete()
            publish(content, path)
