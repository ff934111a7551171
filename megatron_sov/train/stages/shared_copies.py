"""Checkpoints made of the Hugging Face folders that runs start from: one for each content, shared by the runs
of a folder and deleted by none, since a run of adapters needs its base for its whole life.

    RUNS/.from-hf/NAME-KEY/               the checkpoint; KEY is the digest of the files that it is made of
    RUNS/.from-hf/seen/NAME-KEY/STAMP     a folder whose files had these sizes and times had that content
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sov.base.artifacts import MANIFEST, format_json, translate_disk_errors, write_atomically
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.model.pretrained import find_hub_name, is_hf_folder
from megatron_sov.work.progress.locks import critical_section

SHARED, SEEN = ".from-hf", "seen"
WEIGHTS = (".bin", ".safetensors")
SUFFIXES = (*WEIGHTS, ".json", ".jinja", ".model", ".txt")
"""Endings of the files that a conversion may read."""


def find_copy(start: Path, run: Path) -> Path | None:
    """Return the checkpoint that a Hugging Face folder became for `run` or a run beside it, without reading
    weights; None: there is none, or the folder's files have other times."""
    notes = (run.parent / SHARED / SEEN).glob(f"*/{_stamp(start)}")
    copies = [run.parent / SHARED / note.parent.name for note in notes]
    return next((copy for copy in copies if (copy / MANIFEST).is_file()), None)


def convert_start(start: Path, run: Path) -> Path:
    """Return the checkpoint that a run starts from: a Hugging Face folder is converted, unless a run beside
    this one has done so. `UserError` if it cannot be converted, or changes in the meantime."""
    from megatron_sov import convert
    from megatron_sov.engine.parallel import launcher

    if not is_hf_folder(start):
        return start
    if (found := find_copy(start, run)) is not None:
        return found
    stamp, name = _stamp(start), find_hub_name(start).replace("/", "--")[:100]
    copy = run.parent / SHARED / f"{name}-{_digest_of(_files_of(start))}"
    seen = copy.parent / SEEN / copy.name
    with translate_disk_errors(seen):
        seen.mkdir(parents=True, exist_ok=True)
        with critical_section(seen):  # of two runs that begin at once the second finds the copy of the first
            if not (copy / MANIFEST).is_file():
                if code := launcher.run_in_fork(lambda: convert.from_hf(start, copy, redo=True)):
                    raise SystemExit(code)
                if _stamp(start) != stamp:
                    shutil.rmtree(copy)
                    raise UserError(f"--from {start}: its files changed while they were converted; begin "
                                    "again when they are complete")
            write_atomically(seen / stamp, "")
    return copy


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def _stamp(folder: Path) -> str:
    """Return a digest that changes with the files of a folder, without reading them."""
    stats = [(file.name, file.stat()) for file in _files_of(folder)]
    # the kernel sets the time of change (ctime) at each write, and no program can set it back
    facts = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
    return hashlib.sha256(format_json([str(folder.resolve()), facts]).encode()).hexdigest()[:32]


def digest_tokenizer(folder: Path) -> str:
    """Return the digest of the names and contents of a folder's files that are not weights."""
    return _digest_of([file for file in _files_of(folder) if file.suffix not in WEIGHTS])


def _digest_of(files: Sequence[Path]) -> str:
    """Return the digest of the names and contents of files."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(hash_file, files))
    return hashlib.sha256(format_json([[file.name for file in files], digests]).encode()).hexdigest()[:16]
