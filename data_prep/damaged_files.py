"""What to do about a file of a pipeline's folder that does not hold what it should."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_sov.base.artifacts import get_final_name

SHARED = "shared"
"""Folder of a run with what the passes of its steps have left, a folder for each step."""


def get_place_in_run(file: Path) -> str:
    """Return what the checksum of a file that a step's passes left is bound to: the folder of the step's
    address and the names below it, however the run's folder is called; "": it lies in no such folder."""
    for number, folder in enumerate(file.parents):
        if folder.name == SHARED:
            names = file.parts[-number - 1:]
            return "/".join(map(get_final_name, names))
    return ""


def explain_deletion(file: Path) -> str:
    """Return what to do about a damaged file: what a step's passes left goes together; a shard's file would
    be taken over again under another name, of an earlier plan."""
    for folder in file.parents:
        if folder.name == "shards":  # the run's folder may itself lie in one that is called as ours
            break
        if folder.parent.name == SHARED:
            return f"delete {folder} and run the command again"
    if len(file.parents) > 3 and file.parents[3].name == "shards":  # of the output: a folder for each shard
        folders = f"{shlex.quote(str(file.parents[2]))}/*-output-*/{file.parent.name}"
        return f"delete its shard in all plans (`rm -r {folders}`) and run the command again"
    names = shlex.join(["find", str(file.parents[1]), "-samefile", str(file), "-delete"])
    return f"delete it under all of its names (`{names}`) and run the command again"
