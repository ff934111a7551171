"""What a job has done of an output that is not there yet: records in `.OUTPUT.work` beside it.

    .OUTPUT.work/job.json                 what is made, and what it depends on
    .OUTPUT.work/records[-WRITER]         an item's record behind the other, each with its length and checksum

A killed command leaves the folder; the same command goes on behind the last whole record, and one that would
make something else is refused.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import shlex
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_sov.base.artifacts import atomic_write, delete_folder, disk_errors, new_file, to_json
from megatron_sov.base.documents.rows import changed_values
from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.work.progress.locks import LOCK, holding


def work_folder(output: Path) -> Path:
    """Return the folder that keeps what is done of an output until that is there."""
    return output.with_name(f".{output.name}.work")


def slurm_folder(output: Path) -> Path:
    """Return the folder with the logs of Slurm's jobs on an output, which outlive the work."""
    return output.with_name(f".{output.name}.slurm")


def delete_work(output: Path) -> None:
    """Delete the work on an output that is there: first its name, so that a kill on the way leaves no torn
    part that a later command would trust."""
    # what `new_artifact` clears away after a kill
    delete_folder(work_folder(output), output.with_name(f".{output.name}.tmp-{os.getpid()}"))


JOB, RECORDS = "job.json", "records"
PARTS = "[0-9a-f][0-9a-f]/*"
"""Where folders lie that are named by a hash."""
FORMAT_VERSION = 1
REDO = "--redo"
"""Flag of a command that begins anew where something else is unfinished."""
SYNC_EVERY_S = 1.0
MAX_DIFFERENCES = 20
"""That are told."""
_MAX_HEADER_BYTES = 1000
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What `JOB` raises where it is not there, or a disk or a stranger has damaged it."""
Item = int | str
"""What a record is of: JSON keeps both as they are."""


class Journal:
    """Records of a folder.

    >>> journal = Journal(Path("."))
    >>> journal.add([(0, b"first"), (1, b"second")])
    >>> journal.done, [payload for _, payload in journal.records()]
    ({0, 1}, [b'first', b'second'])
    >>> journal.close()
    """

    def __init__(self, folder: Path, writer: str = "") -> None:
        """Open it to add more.

        Args:
            folder: where it lies; a job may keep files of its own there.
            writer: of several that add to it at once; what a kill has left of a record of this one is cut
                off.
        """
        self.folder = folder
        self.done: set[Item] = set()
        """Items with a record."""
        own = folder / (f"{RECORDS}-{writer}" if writer else RECORDS)
        size_bytes = 0
        for file in _files(folder):
            for item, _, end in _records(file):
                self.done.add(item)
                size_bytes = end if file == own else size_bytes
        # what a kill left after the last whole record is cut off, or all later ones could not be read
        self._file = open(own, "ab")  # noqa: SIM115  (closed by `close`)
        self._file.truncate(size_bytes)
        self._synced_s = time.monotonic()

    def add(self, records: Iterable[tuple[Item, bytes]]) -> None:
        """Keep records; a kill behind this loses none of them, a power cut those of the last second.

        Raises:
            UserError: the disk is full, or nothing can be written there.
        """
        with disk_errors(self.folder):
            for item, payload in records:
                # length and checksum first: a reader knows a torn record without a rule for its content
                header = json.dumps([item, len(payload), zlib.crc32(payload)])
                self._file.write(b"%s\n%s\n" % (header.encode(), payload))
                self.done.add(item)
            # out of this process, so that a kill loses nothing; the disk itself is asked once a second
            self._file.flush()
            if time.monotonic() - self._synced_s >= SYNC_EVERY_S:  # each costs as much as many records
                os.fsync(self._file.fileno())
                self._synced_s = time.monotonic()

    def records(self) -> Iterator[tuple[Item, bytes]]:
        """Yield what has been added, in that order; where several writers did, by item."""
        for item, payload, _ in heapq.merge(*map(_records, _files(self.folder)), key=_item_of):
            yield item, payload

    def write_to(self, file: Path) -> None:
        """Make a file of all records, one behind the other; it appears whole."""
        with new_file(file) as temporary, open(temporary, "wb") as f:
            for _, payload in self.records():
                f.write(payload)

    def close(self) -> None:
        """Close the file, with all on the disk."""
        with contextlib.suppress(OSError):  # a full disk was told by `add`
            os.fsync(self._file.fileno())
            self._file.close()


@contextlib.contextmanager
def open_journal(output: Path, made_by: str, identity: Mapping[str, Any], *, redo: bool = False
                 ) -> Iterator[Journal]:
    """Open the journal of an output as a context, and remove it at the end, unless an error ends it.

    Args:
        output: what is to be made.
        made_by: the command, as it is typed.
        identity: JSON values that records depend on.
        redo: begin anew where there are records of something else.

    Raises:
        UserError: another process works on it, records are of something else, or nothing can be written.
    """
    folder = work_folder(output)
    with begun(output, made_by, identity, redo):
        journal = Journal(folder)
        try:
            yield journal
        finally:
            journal.close()
        _delete(folder)


def begin_journal(output: Path, made_by: str, identity: Mapping[str, Any], *, redo: bool = False) -> None:
    """Begin the journal of an output for jobs that do its shares; arguments and errors as of
    `open_journal`."""
    with begun(output, made_by, identity, redo):
        return


@contextlib.contextmanager
def begun(output: Path, made_by: str, identity: Mapping[str, Any], redo: bool = False) -> Iterator[None]:
    """Hold the folder of an output's work, which is of this identity then; arguments and errors as of
    `open_journal`.  An error behind which there is nothing to go on with leaves no folder."""
    folder = work_folder(output)
    now = json.loads(to_json(dict(identity)))  # as the file has it: a tuple is a list there
    with holding(folder, output):
        _, before = _read_job_file(folder)
        # records of other settings must not be mixed with new ones
        if before != now and not redo and (changed := _differing_work(folder, before, now)):
            raise UserError(list_problems(
                f"{output}: {folder} holds unfinished work of another command", changed,
                f"ask for the same to go on, begin anew ({REDO}, or megatron-sov inspect "
                f"{shlex.quote(str(output))} --clear), or name another output"))
        try:
            if before != now:
                _begin(folder, made_by, now)
            yield
        except BaseException:
            if folder.is_dir() and not _has_work(folder):
                _delete(folder)
            raise


def _read_job_file(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the command and what the records of a folder depend on; None after a kill before anything was
    done."""
    try:
        told = json.loads((folder / JOB).read_bytes())
        return str(told["made_by"]), dict(told["identity"])
    except _DAMAGE:
        return "a command", None


def _differing_work(folder: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Return in what the work of a folder differs from what is to be made; [] where it has none."""
    if before is not None:
        return differences(before, now) if _has_work(folder) else []
    others = sorted({file.name for file in folder.iterdir()} - {JOB, LOCK})
    return [f"it has {others[0]!r}, and no {JOB} tells of what command that is"] if others else []


def _begin(folder: Path, made_by: str, identity: dict[str, Any]) -> None:
    with disk_errors(folder):
        _empty(folder)
        atomic_write(folder / JOB, to_json({"format_version": FORMAT_VERSION, "made_by": made_by,
                                            "identity": identity}))


def _empty(folder: Path) -> None:
    """Delete what is in a folder, `JOB` last: a kill on the way leaves nothing that it does not tell of."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == JOB):
        if file.is_file():
            file.unlink()
        else:
            shutil.rmtree(file)


def _delete(folder: Path) -> None:
    with contextlib.suppress(OSError):
        _empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


def done_items(output: Path, identity: Mapping[str, Any]) -> set[Item]:
    """Return the items of an output that have records for this identity; changes nothing."""
    folder = work_folder(output)
    _, before = _read_job_file(folder)
    return items_on_record(folder) if before == json.loads(to_json(dict(identity))) else set()


def items_on_record(folder: Path) -> set[Item]:
    """Return the items that a journal has records of, whoever adds to it meanwhile."""
    return {item for file in _files(folder) for item, _, _ in _records(file)}


def records_by_item(folder: Path) -> Iterator[tuple[Item, bytes]]:
    """Yield the records of a journal by item, whoever has added them in whatever order; one at a time is in
    memory."""
    # places and not records: the output of a job may be larger than memory
    places: list[tuple[Any, int, int]] = []
    files = _files(folder)
    for number, file in enumerate(files):
        start = 0
        for item, _, end in _records(file):
            places.append((item, number, start))
            start = end
    for _, number, start in sorted(places):
        with open(files[number], "rb") as f:  # anew for each: of many writers not all files may be open
            f.seek(start)
            record = _next_record(f)
        assert record is not None, f"{files[number]} has changed"
        yield record


def later_records(folder: Path, ends: dict[Path, int]) -> Iterator[tuple[Item, bytes]]:
    """Yield what a journal's writers have added behind `ends`, each file's, which this brings up to date."""
    for file in _files(folder):
        for item, payload, end in _records(file, ends.get(file, 0)):
            ends[file] = end
            yield item, payload


def read_job(folder: Path) -> dict[str, Any]:
    """Return made_by, identity and num_done (items with a record) of a folder of unfinished work, as far as
    it tells."""
    made_by, identity = _read_job_file(folder)
    return {"made_by": made_by, "identity": identity or {},
            "num_done": len(items_on_record(folder)) + sum(1 for _ in folder.glob(PARTS))
            + sum(read_job(inside)["num_done"] for inside in folder.glob(".*.work"))}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value in which two identities differ, for the first of them."""
    found = [f"{name} was {old}, and is {new}" for name, old, new in changed_values(before, now)]
    more = len(found) - MAX_DIFFERENCES
    return [*found[:MAX_DIFFERENCES], f"and {more:,} more"] if more > 0 else found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{RECORDS}*"))


def _has_work(folder: Path) -> bool:
    """Return whether a job has records, parts, files of its own, or a job inside of it that has some."""
    own = {JOB, LOCK, *(file.name for file in _files(folder))}
    return (any(next(_records(file), None) is not None for file in _files(folder))
            or any(file.is_file() and file.name not in own for file in folder.iterdir())
            or any(folder.glob(PARTS)) or any(map(_has_work, folder.glob(".*.work"))))


def _records(file: Path, begin: int = 0) -> Iterator[tuple[Item, bytes, int]]:
    """Yield item, payload and end of each whole record of a file."""
    with open(file, "rb") as f:
        f.seek(begin)
        while (record := _next_record(f)) is not None:
            yield *record, f.tell()


def _item_of(record: tuple[Item, bytes, int]) -> Any:
    return record[0]


def _next_record(f: IO[bytes]) -> tuple[Item, bytes] | None:
    """Return the next record; None at the end, and where a kill or a power cut has left a part of one."""
    header = f.readline(_MAX_HEADER_BYTES)
    try:
        item, size_bytes, checksum = json.loads(header)
        payload = f.read(size_bytes + 1)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    # the line feed is written last
    whole = len(payload) == size_bytes + 1 and payload.endswith(b"\n")
    return (item, payload[:-1]) if whole and zlib.crc32(payload[:-1]) == checksum else None
