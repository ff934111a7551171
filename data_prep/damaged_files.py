"""Sealed arrays in a pipeline's run folder, and advice to delete damaged files."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import create_file
from megatron_sov.base.sealed import check_seal, seal_file

SHARED = "shared"
"""Subfolder of a run with results from passes over all shards: `shared/STEP/...`."""


def explain_deletion(file: Path) -> str:
    """Return the instruction for a damaged file: delete its `shared/STEP` folder, its shard in all plans, or
    all hard links to the file."""
    for folder in file.parents:
        if folder.name == "shards":  # the run folder itself may be below a folder named `shared`
            break
        if folder.parent.name == SHARED:
            return f"delete {folder} and run the command again"
    # an earlier plan keeps hard links to a shard's files: the next command would reuse them
    if len(file.parents) > 3 and file.parents[3].name == "shards":
        folders = f"{shlex.quote(str(file.parents[2]))}/*-output-*/{file.parent.name}"
        return f"delete its shard in all plans (`rm -r {folders}`) and run the command again"
    names = shlex.join(["find", str(file.parents[1]), "-samefile", str(file), "-delete"])
    return f"delete it under all of its names (`{names}`) and run the command again"


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a sealed .npy file and rename it to `path` once it is on the disk."""
    with create_file(path, create_parents=True) as temporary:
        with open(temporary, "wb") as f:
            np.save(f, array, allow_pickle=False)
        seal_file(temporary)


def read_array(path: Path) -> NDArray[Any]:
    """Map a sealed .npy file into memory, copy on write.

    Compiled loops compile again for read-only arrays, hence the writable map. Raises `UserError`: the file is
    damaged."""
    check_seal(path, explain_deletion(path))
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        array = np.load(path, allow_pickle=False)
    return np.asarray(array)
