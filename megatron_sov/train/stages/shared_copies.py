"""Checkpoints made of the Hugging Face folders that runs start from: one for each content, shared by the runs
of a folder.

    RUNS/.from-hf/NAME-KEY/               the checkpoint; KEY is the digest of the files that it is made of
    RUNS/.from-hf/seen/NAME-KEY/STAMP     a folder whose files had these sizes and times had that content

Nothing here deletes a copy: a run of adapters needs its base for its whole life.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sov.base.artifacts import MANIFEST, atomic_write, disk_errors, to_json
from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.model.pretrained import hub_name, is_hf_folder
from megatron_sov.runs import checkpoints
from megatron_sov.work.progress.locks import in_turn

SHARED, SEEN = ".from-hf", "seen"
SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Endings of the files that a conversion may read."""
WORKERS = 4
KEY_DIGITS, MAX_NAME = 16, 100


def shared_folder(run: Path) -> Path:
    """Return the folder of the copies that a run shares with the runs beside it."""
    return run.parent / SHARED


def find_copy(start: Path, run: Path) -> Path | None:
    """Return the checkpoint that a Hugging Face folder became; None: it has to be converted, or at least read
    again. Reads no weights.

    Args:
        start: the Hugging Face folder.
        run: folder of the run that starts from it.
    """
    # an earlier version made a copy for each run, to whose digest its adapters and rollouts are bound
    own = run.with_name(run.name + SHARED)
    if (own / MANIFEST).is_file() and checkpoints.latest(run / checkpoints.CHECKPOINTS_OF_A_RUN) is not None:
        return own
    shared = shared_folder(run)
    copies = [shared / note.parent.name for note in (shared / SEEN).glob(f"*/{_stamp(start)}")]
    return next((copy for copy in copies if (copy / MANIFEST).is_file()), None)


def convert_start(start: Path, run: Path) -> Path:
    """Return the checkpoint that a run starts from: a Hugging Face folder is converted, unless a run beside
    this one has done so; any other start is returned as it is.

    Raises:
        UserError: the folder cannot be converted, or changes in the meantime.
    """
    from megatron_sov import convert
    from megatron_sov.engine.parallel import launcher

    if not is_hf_folder(start):
        return start
    if (found := find_copy(start, run)) is not None:
        return found
    shared, stamp = shared_folder(run), _stamp(start)
    copy = shared / f"{hub_name(start).replace('/', '--')[:MAX_NAME]}-{_content_key(start)}"
    seen = shared / SEEN / copy.name
    with disk_errors(seen):
        seen.mkdir(parents=True, exist_ok=True)
        with in_turn(seen):  # of two runs that begin at once the second finds the copy of the first
            if not (copy / MANIFEST).is_file():
                code = launcher.apart(lambda: convert.from_hf(start, copy, redo=True))
                if code:
                    raise SystemExit(code)
                if _stamp(start) != stamp:
                    shutil.rmtree(copy)
                    raise UserError(f"--from {start}: its files changed while they were converted; begin "
                                    "again when they are complete")
            atomic_write(seen / stamp, "")
    return copy


def _files_of(folder: Path) -> Iterator[Path]:
    yield from sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def _stamp(folder: Path) -> str:
    """Return a digest that changes with the files of a folder, without reading them: the kernel sets the time
    of change (ctime) at each write, and no program can set it back."""
    stats = [(file.name, file.stat()) for file in _files_of(folder)]
    facts = [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
                                      for name, stat in stats)]
    return hashlib.sha256(to_json(facts).encode()).hexdigest()[:KEY_DIGITS * 2]


def _content_key(folder: Path) -> str:
    """Return the digest of the names and contents of a folder's files; reads all of them."""
    files = list(_files_of(folder))
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = dict(zip((file.name for file in files), pool.map(file_digest, files), strict=True))
    return hashlib.sha256(to_json(digests).encode()).hexdigest()[:KEY_DIGITS]
