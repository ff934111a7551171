"""Journal of an unfinished output: records of completed items in `.OUTPUT.work`.

    .OUTPUT.work/job.json                 command, and the values that records depend on
    .OUTPUT.work/records[-WRITER]         records in sequence, each with length and checksum

A killed command leaves the folder. The same command resumes after the last complete record; another command
is refused.
"""

import contextlib
import heapq
import json
import os
import shlex
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from megatron_sov.base.artifacts import (
    create_file, delete_folder, format_json, translate_disk_errors, write_atomically)
from megatron_sov.base.documents.rows import iter_changes
from megatron_sov.base.errors import UserError, format_problems, stop_check
from megatron_sov.work.progress.locks import LOCK, lock_folder

JOB, RECORDS = "job.json", "records"
PARTS = "[0-9a-f][0-9a-f]/*"
"""Pattern of part folders, which are named by a hash."""
FORMAT_VERSION = 1
REDO = "--redo"
"""Option for discarding unfinished work with a different identity."""
SYNC_EVERY_S = 1.0
MAX_DIFFERENCES = 20
"""Maximum number of differences in an error message."""
_MAX_HEADER_BYTES = 1000
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""Exceptions from reading `JOB` if it is missing or damaged."""
Item = int | str
"""Identifier of a record's item; JSON preserves both types."""


class Journal:
    """Append-only records in a work folder.

    >>> journal = Journal(Path("."))
    >>> journal.add([(0, b"first"), (1, b"second")])
    >>> journal.done, [payload for _, payload in journal.records()]
    ({0, 1}, [b'first', b'second'])
    >>> journal.close()
    """

    def __init__(self, folder: Path, writer: str = "") -> None:
        """Open the journal for appending.

        Args:
            folder: the work folder; jobs may store their own files in it.
            writer: suffix of this writer's file, for several concurrent writers. An incomplete last record in
                this file is truncated.
        """
        self.folder = folder
        self.done: set[Item] = set()
        """Items that have a record."""
        writer_file = folder / (f"{RECORDS}-{writer}" if writer else RECORDS)
        size_bytes = 0
        for file in _record_files(folder):
            for item, _, end in _iter_records(file):
                self.done.add(item)
                size_bytes = end if file == writer_file else size_bytes
        # Truncate an incomplete last record, or readers could not reach later records.
        self._file = open(writer_file, "ab")  # noqa: SIM115  (closed by `close`)
        self._file.truncate(size_bytes)
        self._synced_s = time.monotonic()

    def add(self, records: Iterable[tuple[Item, bytes]]) -> None:
        """Append records. A killed process loses no records, a power failure up to `SYNC_EVERY_S`. Raises
        `UserError`: the disk is full or not writable."""
        with translate_disk_errors(self.folder):
            for item, payload in records:
                # length and checksum reveal an incomplete record regardless of its content
                header = json.dumps([item, len(payload), zlib.crc32(payload)])
                self._file.write(b"%s\n%s\n" % (header.encode(), payload))
                self.done.add(item)
            # flush protects against a kill; fsync once a second against power failures
            self._file.flush()
            if time.monotonic() - self._synced_s >= SYNC_EVERY_S:  # fsync is slow
                os.fsync(self._file.fileno())
                self._synced_s = time.monotonic()

    def records(self) -> Iterator[tuple[Item, bytes]]:
        """Yield records in order of writing; with several writers, sorted by item."""
        sorted_files = map(_iter_records, _record_files(self.folder))
        for item, payload, _ in heapq.merge(*sorted_files, key=itemgetter(0)):
            yield item, payload

    def write_payloads(self, file: Path) -> None:
        """Write the payloads in sequence to a new file, created atomically."""
        with create_file(file) as temporary, open(temporary, "wb") as f:
            for _, payload in self.records():
                f.write(payload)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `add` already reported a full disk
            os.fsync(self._file.fileno())
            self._file.close()


def work_folder(output: Path) -> Path:
    """Return `.OUTPUT.work`, which holds completed work until the output exists."""
    return output.with_name(f".{output.name}.work")


def slurm_folder(output: Path) -> Path:
    """Return `.OUTPUT.slurm`, the folder for Slurm logs, which remains after the work."""
    return output.with_name(f".{output.name}.slurm")


def delete_work(output: Path) -> None:
    """Rename, then delete the work folder of a finished output: a kill leaves no partial work."""
    # `create_artifact` deletes folders with this name after a kill
    delete_folder(work_folder(output), output.with_name(f".{output.name}.tmp-{os.getpid()}"))


@contextlib.contextmanager
def open_journal(output: Path, made_by: str, identity: Mapping[str, Any], *, redo: bool = False
                 ) -> Iterator[Journal]:
    """Open an output's journal as a context; a successful end deletes the journal.

    Args:
        output: path of the output.
        made_by: command line, for messages.
        identity: JSON values that the records depend on.
        redo: discard records of another identity.

    Raises:
        UserError: another process holds the journal, it has another identity, or the disk is not writable.
    """
    folder = work_folder(output)
    with lock_work_folder(output, made_by, identity, redo):
        journal = Journal(folder)
        try:
            yield journal
        finally:
            journal.close()
        _delete_folder(folder)


def begin_journal(output: Path, made_by: str, identity: Mapping[str, Any], *, redo: bool = False) -> None:
    """Create an output's journal for jobs that compute shares; arguments as in `open_journal`."""
    with lock_work_folder(output, made_by, identity, redo):
        return


@contextlib.contextmanager
def lock_work_folder(output: Path, made_by: str, identity: Mapping[str, Any],
                     redo: bool = False) -> Iterator[None]:
    """Lock an output's work folder and write or check its `job.json`; see `open_journal`.

    If an exception escapes and the folder contains no records, delete it.
    """
    stop_check()
    folder = work_folder(output)
    current = json.loads(format_json(dict(identity)))  # JSON turns tuples into lists, as in the file
    with lock_folder(folder, output):
        _, recorded = _read_job_file(folder)
        # records of different settings must not mix
        if recorded != current and not redo and (changed := _find_differences(folder, recorded, current)):
            raise UserError(format_problems(
                f"{output}: {folder} holds unfinished work of another command", changed,
                f"repeat the same command to resume, discard the work ({REDO}, or megatron-sov inspect "
                f"{shlex.quote(str(output))} --clear), or name another output"))
        try:
            if recorded != current:
                _write_job_file(folder, made_by, current)
            yield
        except BaseException:
            if folder.is_dir() and not _has_work(folder):
                _delete_folder(folder)
            raise


def _read_job_file(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Return command and identity from `job.json`; the identity is None for a missing or damaged file."""
    try:
        content = json.loads((folder / JOB).read_bytes())
        return str(content["made_by"]), dict(content["identity"])
    except _DAMAGE:
        return "a command", None


def _find_differences(folder: Path, recorded: dict[str, Any] | None, current: dict[str, Any]) -> list[str]:
    """Return differences between recorded and requested identity, or [] without recorded work."""
    if recorded is not None:
        return describe_differences(recorded, current) if _has_work(folder) else []
    file_names = sorted({file.name for file in folder.iterdir()} - {JOB, LOCK})
    if not file_names:
        return []
    return [f"it contains {file_names[0]!r} but no readable {JOB}, so its command is unknown"]


def _write_job_file(folder: Path, made_by: str, identity: dict[str, Any]) -> None:
    with translate_disk_errors(folder):
        _empty_folder(folder)
        write_atomically(folder / JOB, format_json({"format_version": FORMAT_VERSION, "made_by": made_by,
                                            "identity": identity}))


def _empty_folder(folder: Path) -> None:
    """Delete a folder's content, `JOB` last: after a kill `JOB` still describes the rest."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == JOB):
        if file.is_file():
            file.unlink()
        else:
            shutil.rmtree(file)


def _delete_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        _empty_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def list_finished_items(output: Path, identity: Mapping[str, Any]) -> set[Item]:
    """Return the items with records for this identity; read-only."""
    folder = work_folder(output)
    _, recorded = _read_job_file(folder)
    return list_recorded_items(folder) if recorded == json.loads(format_json(dict(identity))) else set()


def list_recorded_items(folder: Path) -> set[Item]:
    return {item for file in _record_files(folder) for item, _, _ in _iter_records(file)}


def iter_records_by_item(folder: Path) -> Iterator[tuple[Item, bytes]]:
    """Yield a journal's records sorted by item, reading one at a time."""
    # Sort positions (item, file number, byte offset) instead of records: the output may exceed memory.
    positions: list[tuple[Any, int, int]] = []
    files = _record_files(folder)
    for number, file in enumerate(files):
        start = 0
        for item, _, end in _iter_records(file):
            positions.append((item, number, start))
            start = end
    for _, number, start in sorted(positions):
        with open(files[number], "rb") as f:  # reopened: writers may outnumber file handles
            f.seek(start)
            record = _read_record(f)
        assert record is not None, f"{files[number]} has changed"
        yield record


def iter_later_records(folder: Path, ends: dict[Path, int]) -> Iterator[tuple[Item, bytes]]:
    """Yield records added since the byte offsets in `ends` (file -> offset), and advance the offsets."""
    for file in _record_files(folder):
        for item, payload, end in _iter_records(file, ends.get(file, 0)):
            ends[file] = end
            yield item, payload


def read_job(folder: Path) -> dict[str, Any]:
    """Return made_by, identity and num_done (completed items) of an unfinished work folder."""
    made_by, identity = _read_job_file(folder)
    return {"made_by": made_by, "identity": identity or {},
            "num_done": len(list_recorded_items(folder)) + sum(1 for _ in folder.glob(PARTS))
            + sum(read_job(inside)["num_done"] for inside in folder.glob(".*.work"))}


def describe_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two identities, up to `MAX_DIFFERENCES`."""
    lines = [f"{name} was {old}, and is {new}" for name, old, new in iter_changes(recorded, current)]
    num_hidden = len(lines) - MAX_DIFFERENCES
    return [*lines[:MAX_DIFFERENCES], f"and {num_hidden:,} more"] if num_hidden > 0 else lines


def _record_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{RECORDS}*"))


def _has_work(folder: Path) -> bool:
    """Return whether a folder contains records, parts, job files or nested work."""
    journal_files = {JOB, LOCK, *(file.name for file in _record_files(folder))}
    return (any(next(_iter_records(file), None) is not None for file in _record_files(folder))
            or any(file.is_file() and file.name not in journal_files for file in folder.iterdir())
            or any(folder.glob(PARTS)) or any(map(_has_work, folder.glob(".*.work"))))


def _iter_records(file: Path, begin: int = 0) -> Iterator[tuple[Item, bytes, int]]:
    """Yield (item, payload, end offset) for each complete record in a file."""
    with open(file, "rb") as f:
        f.seek(begin)
        while (record := _read_record(f)) is not None:
            yield *record, f.tell()


def _read_record(f: IO[bytes]) -> tuple[Item, bytes] | None:
    """Read the next record, or return None at the end or at an incomplete record."""
    header = f.readline(_MAX_HEADER_BYTES)
    try:
        item, size_bytes, checksum = json.loads(header)
        payload = f.read(size_bytes + 1)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    # the newline is written last
    is_complete = len(payload) == size_bytes + 1 and payload.endswith(b"\n")
    return (item, payload[:-1]) if is_complete and zlib.crc32(payload[:-1]) == checksum else None
