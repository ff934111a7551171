"""What a folder or file is, who made it from what, how far unfinished work on it is, and some of its rows."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, damaged_files, disk_errors, origins_of, read_manifest
from megatron_sov.base.errors import GateFailed, UserError, visible
from megatron_sov.base.hints.removed import check_folder, check_kind
from megatron_sov.base.settings import NotNegativeInt
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.work.progress.journal import delete_work, read_job, work_folder
from megatron_sov.work.progress.locks import holding

MAX_CHARS = 160
"""Of a value, or of a row, that is shown."""
MAX_TIME_S = 1e11
"""No artifact is made later."""
MAX_PROBLEMS = 20
"""That are told of what is not sound."""
ROW_FILES = ("*.jsonl", "*.parquet")
STORE = "rollout store"


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """How something is looked into."""

    rows: NotNegativeInt = 3
    """Rows to show."""
    verify: bool = False
    """Check all of it: hashes, and what its kind promises; exit code 3 where something is wrong."""
    clear: bool = False
    """Delete unfinished work on it, which the same command would go on with."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ArtifactKind:
    """How one kind of thing is looked into, besides what all have."""

    lines: Callable[[Path], Iterable[str]]
    """What it holds."""
    problems: Callable[[Path], list[str]]
    """What is wrong in it, hashes included."""
    rows: Callable[[Path, int], Iterable[Any]] | None = None
    """The first so many of its rows; None: those of its files of rows."""


def look(path: Path, options: LookOptions, kinds: Mapping[str, ArtifactKind]) -> None:
    """Print what is known.

    Args:
        path: anything.
        options: how.
        kinds: name -> kinds of which more is known.

    Raises:
        UserError: nothing is there, or it is nothing that we have made.
        GateFailed: with `verify`: something is wrong in it.
    """
    found = {**_of_artifact(path), **_unfinished(path), **_of_others(path)}
    around = next((folder for folder in path.parents if (folder / MANIFEST).is_file()), None)
    if not found and around is not None and path.exists():
        raise UserError(f"{path}: is part of {around}; pass {around}")
    if not found:
        raise UserError(f"{path}: " + ("is nothing that megatron-sov has made" if path.exists() else
                                       "does not exist, and no work on it is unfinished") +
                        "; name an artifact, a run, a store, a file of rows, or a command's --output")
    kind = kinds.get(found.get("kind", ""))
    # Everything is read before anything is printed: a damaged part gives one error, not half a page.
    held = [] if kind is None else list(kind.lines(path))
    shown = kind.rows if kind is not None and kind.rows is not None else _rows
    rows = list(shown(path, options.rows)) if options.rows else []
    if options.json:
        print(json.dumps({"path": str(path), **found, "rows": rows}, indent=1, ensure_ascii=False))
    else:
        first, *more = _lines(path, found)
        for line in [first, *(f"  {line}" for line in held), *more,
                     *(f"  row {n}: {_short(row)}" for n, row in enumerate(rows, 1))]:
            print(visible(line))
    said = sys.stderr if options.json else sys.stdout
    if options.clear:
        print(visible(_clear(path)), file=said)
    if options.verify:
        print(visible(_verify(path, found, kind)), file=said)


def _verify(path: Path, found: Mapping[str, Any], kind: ArtifactKind | None) -> str:
    """Return that all is well; raises `GateFailed` where it is not."""
    if kind is None and not (path / MANIFEST).is_file():
        raise UserError(f"{path}: --verify has nothing to compare it with; it has no {MANIFEST}")
    if problems := damaged_files(path) if kind is None else kind.problems(path):
        more = f"\n... and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise GateFailed("\n".join(map(visible, problems[:MAX_PROBLEMS])) + more)
    return f"{path}: " + ("every file has the hash of its manifest" if kind is None else
                          f"sound as {found['kind']}")


def _of_artifact(path: Path) -> dict[str, Any]:
    """Return what a manifest says; {} where there is none."""
    if not (path / MANIFEST).is_file():
        return {}
    manifest = read_manifest(path)
    check_kind(path, manifest.kind)
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
    check_folder(path)
    if (path / EVENTS).is_file():
        return {"kind": "run", "more": f"megatron-sov status {shlex.quote(str(path))}"}
    if (path / "store.json").is_file():
        return {"kind": STORE, "more": f"megatron-sov rl store show {shlex.quote(str(path))} PART ROW"}
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, "rb") as f:
            return {"kind": "file of rows", "num_rows": sum(bool(line.strip()) for line in f),
                    "size_bytes": path.stat().st_size}
    return {}


def _rows(path: Path, count: int) -> Iterator[Any]:
    """Yield the first rows of a file of rows, or of the first one of a folder."""
    inside = sorted(file for pattern in ROW_FILES for file in path.rglob(pattern)
                    if not file.name.startswith(".")) if path.is_dir() else [path]
    if not inside or not inside[0].is_file():
        return
    if inside[0].suffix == ".parquet":
        from megatron_sov.base.documents import BadRecord
        from megatron_sov.base.documents.files import open_parquet

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


def _lines(path: Path, found: Mapping[str, Any]) -> Iterator[str]:
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
        # an artifact that was made after it may go on with it
        state = "kept" if found.get("created_s", 0.0) >= work["changed_s"] else "unfinished"
        yield (f"{path}: {state} work of `{work['made_by']}` in {work['folder']}: {work['num_done']:,} "
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


def _clear(path: Path) -> str:
    work = work_folder(path)
    if not work.is_dir():
        raise UserError(f"--clear: no work on {path} is unfinished")
    # Under the work's lock: it must not be deleted under a command that uses it.
    with holding(work, path), disk_errors(work):
        delete_work(path)
    return f"{path}: its unfinished work is deleted"
