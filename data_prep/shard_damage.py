"""What to do about a file of a pipeline's folder that does not hold what it should."""

from __future__ import annotations

import shlex
from pathlib import Path

SHARED = "shared"
"""Folder of a run with what the passes of its steps have left, a folder for each step."""


def way_out(file: Path) -> str:
    """Return what to do about a damaged file: what a step's passes left goes together; a shard's file would
    be taken over again under another name, of an earlier plan."""
    for folder in file.parents:
        if folder.parent.name == SHARED:
            return f"delete {folder} and run the command again"
    if len(file.parents) > 3 and file.parents[3].name == "shards":  # of the output: a folder for each shard
        folders = f"{shlex.quote(str(file.parents[2]))}/*-output-*/{file.parent.name}"
        return f"delete its shard in all plans (`rm -r {folders}`) and run the command again"
    names = shlex.join(["find", str(file.parents[1]), "-samefile", str(file), "-delete"])
    return f"delete it under all of its names (`{names}`) and run the command again"
