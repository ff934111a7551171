"""Artifacts whose making goes on after a kill: finished files are kept with their hashes,
and are not made again.

While `OUT` is made, everything stands in `.OUT.partial` beside it: `plan.json` (what is made, from which
files), `finished.jsonl` (name, hash and size of every file that is on disk) and `content/`, which becomes
`OUT` by a rename when it is complete.  The same command goes on there after a kill; another one, or one whose
source has changed, begins anew.  An error leaves nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import (
    ArtifactWriter,
    FileRecord,
    atomic_write,
    clear_leftovers,
    disk_errors,
    publish,
    refuse_existing,
    to_json,
)
from megatron_sov.outputs import behind_links
from megatron_sov.version import __version__
from megatron_sov.work.locks import holding

PLAN, FINISHED, CONTENT = "plan.json", "finished.jsonl", "content"


class ResumableArtifact:
    """An artifact under construction; obtained from `resumable_artifact`."""

    def __init__(self, writer: ArtifactWriter, log: Path) -> None:
        self.writer = writer
        """Takes contents, settings and inputs."""
        self._log, self._lock = log, threading.Lock()
        self.finished: dict[str, FileRecord] = _finished(log, writer.path)
        """Files that need not be made again."""
        _keep_only(writer.path, set(self.finished))

    @property
    def path(self) -> Path:
        """The folder to write files into."""
        return self.writer.path

    def finish(self, name: str, record: FileRecord) -> None:
        """Note, from any thread, that a file is complete and synced; `name` is relative to the artifact."""
        line = json.dumps({"name": name, **dataclasses.asdict(record)}) + "\n"
        with self._lock:
            with open(self._log, "a", encoding="utf-8") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
            self.finished[name] = record


@contextlib.contextmanager
def resumable_artifact(path: Path, kind: str, plan: dict[str, Any], *, overwrite: bool = False,
                       kills: tuple[type[Exception], ...] = ()) -> Iterator[ResumableArtifact]:
    """Make an artifact that appears under `path` only when complete; a killed one goes on where it was.

    Args:
        path: the folder that will hold the artifact.
        kind: the manifest's kind.
        plan: JSON values that decide every byte of the files; where they differ from the killed one's,
            nothing of it is used.
        overwrite: replace an artifact of the same kind that is already there.
        kills: errors behind which one can go on as behind a kill: what a process meets when another is lost.

    Raises:
        UserError: `path` exists and may not be replaced, another process is making it, or the disk refuses.
    """
    path = behind_links(path)
    work = partial_folder(path)
    with disk_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        refuse_existing(path, kind, overwrite)
        stack.enter_context(holding(work, path))
        try:
            _begin(work, {"kind": kind, "version": __version__, **plan})
            artifact = ResumableArtifact(ArtifactWriter(work / CONTENT, kind), work / FINISHED)
            yield artifact
            artifact.writer.known_files |= artifact.finished
            artifact.writer.complete()
            publish(work / CONTENT, path)
        except Exception as e:  # not KeyboardInterrupt, which is a kill and can go on
            if not isinstance(e, kills):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Return the folder in which the artifact `path` is made."""
    return path.with_name(f".{path.name}.partial")


def fingerprint(folder: Path) -> list[list[Any]]:
    """Return name, size and time of every file below a folder: what a plan says about its source."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _begin(work: Path, plan: dict[str, Any]) -> None:
    """Keep what is there if it was made to the same plan, else empty the folder and write the plan."""
    text = to_json(plan)
    file = work / PLAN
    if not (file.is_file() and file.read_text(encoding="utf-8") == text and (work / CONTENT).is_dir()):
        shutil.rmtree(work / CONTENT, ignore_errors=True)
        (work / FINISHED).unlink(missing_ok=True)
        (work / CONTENT).mkdir()
        atomic_write(file, text)


def _finished(log: Path, content: Path) -> dict[str, FileRecord]:
    """Return the files on record that stand on disk in their full size;
    a torn last line counts for nothing."""
    found: dict[str, FileRecord] = {}
    for line in log.read_text(encoding="utf-8").split("\n") if log.is_file() else ():
        with contextlib.suppress(ValueError):
            raw = json.loads(line)
            file = content / raw["name"]
            if file.is_file() and file.stat().st_size == raw["size_bytes"]:
                found[raw["name"]] = FileRecord.read(raw)
    return found


def _keep_only(content: Path, names: set[str]) -> None:
    for file in [p for p in content.rglob("*") if p.is_file()]:
        if file.relative_to(content).as_posix() not in names:
            file.unlink()
