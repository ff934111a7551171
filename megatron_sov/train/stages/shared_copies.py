"""Checkpoints converted from Hugging Face folders, shared by the runs of a parent folder RUNS.

Runs never delete a shared checkpoint, because adapters need their base model for their whole life.

    RUNS/.from-hf/NAME-KEY/               the checkpoint; KEY is the digest of the converted files
    RUNS/.from-hf/seen/NAME-KEY/STAMP     a Hugging Face folder with file sizes and times STAMP had digest KEY
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sov.base.artifacts import MANIFEST, format_json
from megatron_sov.base.digests import hash_file

SHARED, STAMPS = ".from-hf", "seen"
WEIGHTS = (".bin", ".safetensors")
SUFFIXES = (*WEIGHTS, ".json", ".jinja", ".model", ".txt")
"""File suffixes that a conversion may read."""


def find_copy(start: Path, run: Path) -> Path | None:
    """Return the shared checkpoint converted from the Hugging Face folder `start`, without reading weights.

    Returns None if `run.parent` has no such checkpoint, or if files in `start` have changed sizes or times.
    """
    stamps = (run.parent / SHARED / STAMPS).glob(f"*/{digest_stats(start)}")
    copies = [run.parent / SHARED / stamp.parent.name for stamp in stamps]
    return next((copy for copy in copies if (copy / MANIFEST).is_file()), None)


def list_model_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def digest_stats(folder: Path) -> str:
    """Digest file names, sizes and times in a folder, without reading the files."""
    stats = [(file.name, file.stat()) for file in list_model_files(folder)]
    # the kernel sets the time of change (ctime) at each write, and no program can set it back
    facts = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
    return hashlib.sha256(format_json([str(folder.resolve()), facts]).encode()).hexdigest()[:32]


def digest_tokenizer(folder: Path) -> str:
    """Digest file names and contents in a folder, without weights."""
    return digest_files([file for file in list_model_files(folder) if file.suffix not in WEIGHTS])


def digest_files(files: Sequence[Path]) -> str:
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(hash_file, files))
    return hashlib.sha256(format_json([[file.name for file in files], digests]).encode()).hexdigest()[:16]
