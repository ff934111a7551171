"""Bind checksums to files in a pipeline's run folder, and explain how to delete damaged files."""

import shlex
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import get_final_name
from megatron_sov.base.sealed import read_sealed_json

SHARED = "shared"
"""Subfolder of a run with results from passes over all shards: `shared/STEP/...`."""


def get_place_in_run(file: Path) -> str:
    """Return the path below `shared/` that a checksum covers, so that a run folder can be renamed; "" for
    files outside `shared/`."""
    for number, folder in enumerate(file.parents):
        if folder.name == SHARED:
            return "/".join(map(get_final_name, file.parts[-number - 1:]))
    return ""


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


def read_run_json(file: Path) -> Any:
    """Return the value in a sealed JSON file. Raises `UserError`: it is missing, damaged or another file."""
    return read_sealed_json(file, explain_deletion(file), get_place_in_run(file))
