"""What is scored so far: rows in order in a folder beside the output, which they become when all are there.

A killed command leaves the folder; the same command goes on behind its last whole row.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, disk_errors, fsync_path
from megatron_sov.work.locks import holding

IDENTITY, ROWS = "identity.json", "rows.jsonl"


class Journal:
    """Rows that are done, kept until all are.

    Args:
        folder: where.
        output: the file that they become.
        num_done: rows that are there already.
    """

    def __init__(self, folder: Path, output: Path, num_done: int) -> None:
        self._folder, self._output, self.num_done = folder, output, num_done
        self._file = open(folder / ROWS, "ab")  # noqa: SIM115  (closed by `opened`)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are there."""
        with open(self._folder / ROWS, "rb") as f:
            yield from map(json.loads, f)

    def add(self, lines: list[bytes]) -> None:
        """Keep the next rows; a kill behind this loses none of them."""
        with disk_errors(self._output):
            self._file.writelines(lines)
            self._file.flush()
        self.num_done += len(lines)

    def publish(self) -> None:
        """Make the rows the output, in one step, and remove the folder."""
        with disk_errors(self._output):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._folder / ROWS, self._output)
            fsync_path(self._output.parent)
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk was told by `add`
            self._file.close()


def folder_of(output: Path) -> Path:
    """Return the folder of an output's journal."""
    return output.with_name(f".{output.name}.scoring")


def num_kept(output: Path, identity: dict[str, Any]) -> int:
    """Return how many whole rows the journal of an output holds for this identity; changes nothing."""
    folder = folder_of(output)
    return _whole_rows(folder / ROWS)[0] if _is_of(folder, identity) else 0


@contextlib.contextmanager
def opened(output: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """Open the journal of an output as a context: of a killed command of the same identity, or a new one.

    Args:
        output: the file to make.
        identity: what the rows depend on; another one begins anew.

    Raises:
        UserError: another process writes it now, or nothing can be written there.
    """
    folder = folder_of(output)
    with holding(folder, f"--output {output}"):
        if not _is_of(folder, identity):
            (folder / ROWS).unlink(missing_ok=True)
            atomic_write(folder / IDENTITY, json.dumps(identity))
        num_done, end = _whole_rows(folder / ROWS)
        if (folder / ROWS).exists():
            os.truncate(folder / ROWS, end)  # what a kill left of the next one
        journal = Journal(folder, output, num_done)
        try:
            yield journal
        finally:
            journal.close()


def _is_of(folder: Path, identity: dict[str, Any]) -> bool:
    """Return whether rows are of an identity, as its file has it: a tuple is a list there."""
    try:
        return bool(json.loads((folder / IDENTITY).read_bytes()) == json.loads(json.dumps(identity)))
    except (OSError, ValueError):
        return False


def _whole_rows(path: Path) -> tuple[int, int]:
    """Return how many whole rows a file has, and where the last one ends."""
    if not path.exists():
        return 0, 0
    num_rows = end = 0
    with open(path, "rb") as f:
        for line in f:
            if line.endswith(b"\n"):
                num_rows, end = num_rows + 1, end + len(line)
    return num_rows, end
