"""Checkpoints made of the Hugging Face folders that runs start from: one for each content, shared by the runs
of a folder and deleted by none, since a run of adapters needs its base for its whole life.

    RUNS/.from-hf/NAME-KEY/               the checkpoint; KEY is the digest of the files that it is made of
    RUNS/.from-hf/seen/NAME-KEY/STAMP     a folder whose files had these sizes and times had that content
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sov.base.artifacts import MANIFEST, format_json
from megatron_sov.base.digests import hash_file

SHARED, SEEN = ".from-hf", "seen"
WEIGHTS = (".bin", ".safetensors")
SUFFIXES = (*WEIGHTS, ".json", ".jinja", ".model", ".txt")
"""Endings of the files that a conversion may read."""


def find_copy(start: Path, run: Path) -> Path | None:
    """Return the checkpoint that a Hugging Face folder became for `run` or a run beside it, without reading
    weights; None: there is none, or the folder's files have other times."""
    notes = (run.parent / SHARED / SEEN).glob(f"*/{digest_stats(start)}")
    copies = [run.parent / SHARED / note.parent.name for note in notes]
    return next((copy for copy in copies if (copy / MANIFEST).is_file()), None)


def list_model_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def digest_stats(folder: Path) -> str:
    """Return a digest that changes with the files of a folder, without reading them."""
    stats = [(file.name, file.stat()) for file in list_model_files(folder)]
    # the kernel sets the time of change (ctime) at each write, and no program can set it back
    facts = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
    return hashlib.sha256(format_json([str(folder.resolve()), facts]).encode()).hexdigest()[:32]


def digest_tokenizer(folder: Path) -> str:
    """Return the digest of the names and contents of a folder's files that are not weights."""
    return digest_files([file for file in list_model_files(folder) if file.suffix not in WEIGHTS])


def digest_files(files: Sequence[Path]) -> str:
    """Return the digest of the names and contents of files."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(hash_file, files))
    return hashlib.sha256(format_json([[file.name for file in files], digests]).encode()).hexdigest()[:16]
