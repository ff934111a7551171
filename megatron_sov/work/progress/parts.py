"""Parts of an output that is not there yet, each a folder named by a hash of all that it depends on.

The same command, and one with more input or other settings, takes those that fit and makes the rest beside
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_sov.base.artifacts import new_folder
from megatron_sov.work.progress.folders import delete_work, work_folder
from megatron_sov.work.progress.journal import begin_journal, begun


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
        yield work_folder(output)
        delete_work(output)


def begin_parts(output: Path, made_by: str) -> None:
    """Begin the parts of an output for jobs that make some of them; arguments and errors as of
    `open_parts`."""
    begin_journal(output, made_by, {"command": made_by})
