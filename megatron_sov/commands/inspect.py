"""`megatron-sov inspect PATH`: what a folder or file is, who made it from what, and how far."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.artifacts import MANIFEST, damaged_files, disk_errors, origins_of, read_manifest
from megatron_sov.documents.visible import visible
from megatron_sov.errors import ExitCode, GateFailed, UserError
from megatron_sov.obs.events import EVENTS
from megatron_sov.settings import Flag, NotNegativeInt, add_options, read_options
from megatron_sov.work.folders import delete_work, work_folder
from megatron_sov.work.journal import read_job
from megatron_sov.work.locks import holding

MAX_CHARS = 160
"""Of a value, or of a row, that is shown."""
MAX_TIME_S = 1e11
"""No artifact is made later."""
ROW_FILES = ("*.jsonl", "*.parquet")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Say what a folder or file is, from what it was made, how far unfinished work on it is, and some of its
    rows."""

    path: Annotated[Path, Flag("PATH")]
    """Any artifact, run, rollout store, file of rows, or the --output of a command that was killed."""
    rows: NotNegativeInt = 3
    """Rows to show."""
    verify: bool = False
    """Compare every file with its hash."""
    clear: bool = False
    """Delete unfinished work on it, which the same command would go on with."""
    json: bool = False
    """Print it as JSON."""


add_arguments = partial(add_options, cls=InspectOptions)


def run(args: argparse.Namespace) -> int:
    """Print what is known.

    Raises:
        UserError: nothing is there, or it is nothing that we have made.
        GateFailed: with --verify: a file is missing or differs.
    """
    options = read_options(InspectOptions, args)
    path = options.path
    found = {**_of_artifact(path), **_unfinished(path), **_of_others(path)}
    if not found:
        raise UserError(f"{path}: " + ("is nothing that megatron-sov has made" if path.exists() else
                                       "does not exist, and no work on it is unfinished") +
                        "; name an artifact, a run, a store, a file of rows, or a command's --output")
    rows = list(_rows(path, options.rows))
    if options.json:
        print(json.dumps({"path": str(path), **found, "rows": rows}, indent=1, ensure_ascii=False))
    else:
        for line in [*_lines(path, found), *(f"  row {n}: {_short(row)}" for n, row in enumerate(rows, 1))]:
            print(visible(line))
    if options.clear:
        _clear(path)
    if options.verify and (path / MANIFEST).is_file():
        if damaged := damaged_files(path):
            raise GateFailed("\n".join(damaged))
        print(f"{path}: every file has the hash of its manifest")
    return ExitCode.OK


def _of_artifact(path: Path) -> dict[str, Any]:
    """Return what a manifest says; {} where there is none."""
    if not (path / MANIFEST).is_file():
        return {}
    manifest = read_manifest(path)
    if not (isinstance(manifest.content, dict) and isinstance(manifest.settings, dict)
            and isinstance(manifest.inputs, list) and isinstance(manifest.created_s, int | float)
            and 0 <= manifest.created_s < MAX_TIME_S):
        raise UserError(f"{path / MANIFEST}: is damaged (content, settings, inputs or created_s have another "
                        "form); make the artifact again or restore it from a copy")
    return {"kind": manifest.kind, "created_s": manifest.created_s, "num_files": len(manifest.files),
            "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
            "content": manifest.content, "settings": manifest.settings,
            "made_from": origins_of(path, manifest)}


def _unfinished(path: Path) -> dict[str, Any]:
    """Return what work on an output is not finished; {} where there is none."""
    work = work_folder(path)
    if not work.is_dir():
        return {}
    files = [file for file in work.rglob("*") if file.is_file()]
    return {"unfinished": {
        "folder": str(work), **read_job(work), "size_bytes": sum(file.stat().st_size for file in files),
        "changed_s": max((file.stat().st_mtime for file in files), default=work.stat().st_mtime)}}


def _of_others(path: Path) -> dict[str, Any]:
    """Return the kind of what has no manifest."""
    if (path / MANIFEST).is_file():
        return {}
    if (path / EVENTS).is_file():
        return {"kind": "run", "more": f"megatron-sov status {path}"}
    if (path / "store.json").is_file():
        return {"kind": "rollout store", "more": f"megatron-sov rl store stats {path}"}
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, "rb") as f:
            return {"kind": "file of rows", "num_rows": sum(bool(line.strip()) for line in f),
                    "size_bytes": path.stat().st_size}
    return {}


def _rows(path: Path, count: int) -> Iterator[Any]:
    """Yield the first rows of a file of rows, or of the first one of a folder."""
    inside = sorted(file for pattern in ROW_FILES for file in path.rglob(pattern)
                    if not file.name.startswith(".")) if path.is_dir() else [path]
    if not inside or not inside[0].is_file() or not count:
        return
    if inside[0].suffix == ".parquet":
        from megatron_sov.documents import BadRecord
        from megatron_sov.documents.files import open_parquet

        try:
            batches = open_parquet(inside[0]).iter_batches(batch_size=count)
            yield from (row for batch in islice(batches, 1) for row in batch.to_pylist())
        except (BadRecord, OSError, ValueError) as e:  # pyarrow's of damaged pages are of these
            yield f"{inside[0].name} cannot be read: {e}"
        return
    if inside[0].suffix == ".jsonl":
        with open(inside[0], "rb") as f:
            for line in islice(f, count):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield line.decode(errors="replace")


def _lines(path: Path, found: dict[str, Any]) -> Iterator[str]:
    size = f", {found['size_bytes']:,} bytes" if "size_bytes" in found else ""
    if "created_s" in found:
        made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found["created_s"]))
        yield f"{path}: artifact of kind {found['kind']}, {found['num_files']:,} files{size}, made {made}"
    elif "kind" in found:
        rows = f", {found['num_rows']:,} rows" if "num_rows" in found else ""
        yield f"{path}: {found['kind']}{rows}{size}" + (f"; see `{found['more']}`" if "more" in found else "")
    for part in ("content", "settings"):
        for name, value in found.get(part, {}).items():
            yield f"  {part}.{name}: {_short(value)}"
    yield from _tree(found.get("made_from", []), 1)
    if work := found.get("unfinished"):
        changed = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(work["changed_s"]))
        yield (f"{path}: unfinished work of `{work['made_by']}` in {work['folder']}: {work['num_done']:,} "
               f"pieces, {work['size_bytes']:,} bytes, last changed {changed}; the same command goes on, "
               "--clear deletes it")
        for name, value in work["identity"].items():
            yield f"  identity.{name}: {_short(value)}"


def _tree(origins: list[dict[str, Any]], depth: int) -> Iterator[str]:
    for origin in origins:
        yield f"{'  ' * depth}made from {origin['kind']} {origin['path']} ({origin['state']})"
        yield from _tree(origin["made_from"], depth + 1)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}... ({len(text):,} characters)"


def _clear(path: Path) -> None:
    work = work_folder(path)
    if not work.is_dir():
        raise UserError(f"--clear: no work on {path} is unfinished")
    with holding(work, path), disk_errors(work):
        delete_work(path)
    print(f"{path}: its unfinished work is deleted")
