"""Implementation of `inspect`: show a path's artifact kind, origin, unfinished work and first rows."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    MANIFEST, find_damaged_files, read_manifest, trace_origins, translate_disk_errors)
from megatron_sov.base.errors import Fix, GateFailed, UserError, escape_controls, stop_check, warn
from megatron_sov.base.hints.removed import check_folder, check_kind
from megatron_sov.base.settings import NotNegativeInt
from megatron_sov.model.pretrained import ADAPTER_CONFIG, is_hf_folder
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.work.progress.journal import delete_work, read_job, work_folder
from megatron_sov.work.progress.locks import lock_folder

MAX_CHARS = 160
"""Maximum characters per displayed value or row."""
MAX_TIME_S = 1e11
"""Maximum plausible creation time, in seconds since 1970; a later time means a damaged manifest."""
MAX_PROBLEMS = 20
"""Maximum problems in an error message."""
ROW_FILES = ("*.jsonl", "*.parquet")
STORE = "rollout store"
"""Kind of a folder with rollouts, which has no manifest."""


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """Options for `inspect`."""

    rows: NotNegativeInt = 3
    """Rows to show."""
    verify: bool = False
    """Check hashes and the rules for this kind; exit code 3 for problems."""
    clear: bool = False
    """Delete unfinished work, which the same command would otherwise resume."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ArtifactKind:
    """Display and verification functions for one artifact kind."""

    lines: Callable[[Path], Iterable[str]]
    """Content summary lines."""
    problems: Callable[[Path], list[str]]
    """Problems in the content, including wrong hashes."""
    rows: Callable[[Path, int], Iterable[Any]] | None = None
    """Return the first N rows. None: read `ROW_FILES`."""


def inspect_path(path: Path, options: InspectionOptions, kinds: Mapping[str, ArtifactKind]) -> None:
    """Print information about a file or folder. Raises `GateFailed`: `verify` found problems."""
    facts = {**_describe_artifact(path), **_describe_unfinished_work(path), **_describe_path(path)}
    artifact = next((folder for folder in path.parents if (folder / MANIFEST).is_file() or (
        folder / ADAPTER_CONFIG).is_file()), None)
    if not facts and artifact is not None and path.exists():
        raise UserError(f"{path}: is part of {artifact}; pass {artifact}",
                        Fix(words={str(path): str(artifact)}))
    if not facts and path.suffix == ".parquet" and path.is_file():
        problems = [row for row in _read_rows(path, 1) if isinstance(row, str)]
        if problems:
            raise UserError(problems[0])
        raise UserError(f"{path}: is a file of rows; `sov-data pack --input` and --data of the training "
                        "commands read it")
    if not facts:
        # not at the top: it loads all recipes
        from megatron_sov.runs.checkpoints import CHECKPOINT_KIND, RUN, check_folder_kind, refuse_run_part

        refuse_run_part(path)
        if (path / ADAPTER_CONFIG).is_file() or is_hf_folder(path):
            check_folder_kind(path, (CHECKPOINT_KIND, RUN), "an artifact or a run")
        problem = "does not exist, and no work on it is unfinished"
        if path.exists():
            problem = "is nothing that megatron-sov has made"
        raise UserError(f"{path}: {problem}; name an artifact, a run, a store, a file of rows, or a "
                        "command's --output")
    kind = kinds.get(facts.get("kind", ""))
    # Read everything before printing: a damaged part gives an error instead of half a page.
    summary = [] if kind is None else list(kind.lines(path))
    read_rows = kind.rows if kind is not None and kind.rows is not None else _read_rows
    rows = list(read_rows(path, options.rows)) if options.rows else []
    if options.json:
        print(json.dumps({"path": str(path), **facts, "rows": rows}, indent=1, ensure_ascii=False))
    else:
        first, *more = _format_facts(path, facts)
        for line in [first, *(f"  {line}" for line in summary), *more,
                     *(f"  row {n}: {_shorten_value(row)}" for n, row in enumerate(rows, 1))]:
            print(escape_controls(line))
    stream = sys.stderr if options.json else sys.stdout
    if options.clear:
        stop_check()
        print(escape_controls(_clear_unfinished_work(path)), file=stream)
    if options.verify:
        print(escape_controls(_verify_artifact(path, facts, kind)), file=stream)


def _verify_artifact(path: Path, facts: Mapping[str, Any], kind: ArtifactKind | None) -> str:
    """Return a success message. Raises `GateFailed`: the artifact has problems."""
    if kind is None and not (path / MANIFEST).is_file():
        raise UserError(f"{path}: --verify has nothing to compare it with; it has no {MANIFEST}")
    if problems := find_damaged_files(path) if kind is None else kind.problems(path):
        rest = f"\n... and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise GateFailed("\n".join(map(escape_controls, problems[:MAX_PROBLEMS])) + rest)
    return f"{path}: " + ("every file has the hash of its manifest" if kind is None else
                          f"sound as {facts['kind']}")


def _describe_artifact(path: Path) -> dict[str, Any]:
    """Return the facts in the manifest, with sizes and origins; {} without a manifest."""
    if not (path / MANIFEST).is_file():
        return {}
    manifest = read_manifest(path)
    check_kind(path, manifest.kind)
    if missing := [name for name in manifest.files if not (path / name).exists()]:
        verb = "is" if len(missing) == 1 else "are"
        warn(escape_controls(f"{path}: {', '.join(missing[:3])} {verb} in its {MANIFEST} and missing; copy "
                             "or download the folder again"))
    if not (isinstance(manifest.content, dict) and isinstance(manifest.settings, dict)
            and isinstance(manifest.inputs, list) and isinstance(manifest.created_s, int | float)
            and 0 <= manifest.created_s < MAX_TIME_S):
        raise UserError(f"{path / MANIFEST}: is damaged (content, settings, inputs or created_s have another "
                        "form); make the artifact again or restore it from a copy")
    return {"kind": manifest.kind, "created_s": manifest.created_s, "num_files": len(manifest.files),
            "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
            "content": manifest.content, "settings": manifest.settings,
            "made_from": trace_origins(path, manifest)}


def _describe_unfinished_work(path: Path) -> dict[str, Any]:
    """Return the state of unfinished work on an output, or {}."""
    work = work_folder(path)
    if not work.is_dir():
        return {}
    files = [file for file in work.rglob("*") if file.is_file()]
    return {"unfinished": {
        "folder": str(work), **read_job(work), "size_bytes": sum(file.stat().st_size for file in files),
        "changed_s": max((file.stat().st_mtime for file in files), default=work.stat().st_mtime)}}


def _describe_path(path: Path) -> dict[str, Any]:
    """Return the kind of a path without manifest, or {}."""
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


def _read_rows(path: Path, count: int) -> Iterator[Any]:
    """Yield the first rows from a row file, or from the first row file in a folder."""
    files = [path]
    if path.is_dir():
        files = sorted(file for pattern in ROW_FILES for file in path.rglob(pattern)
                       if not file.name.startswith("."))
    if not files or not files[0].is_file():
        return
    if files[0].suffix == ".parquet":
        # not at the top: `--help` reads no documents
        from megatron_sov.base.documents import BadRecord
        from megatron_sov.base.documents.files import open_parquet

        try:
            batches = open_parquet(files[0]).iter_batches(batch_size=count)
            yield from (row for batch in islice(batches, 1) for row in batch.to_pylist())
        except (BadRecord, OSError, ValueError) as e:  # pyarrow raises these for damaged pages
            yield f"{files[0].name} cannot be read: {e}"
        return
    if files[0].suffix == ".jsonl":
        with open(files[0], "rb") as f:
            for line in islice(f, count):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield line.decode(errors="replace")


def _format_facts(path: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report: artifact, content and settings, origins, and unfinished work."""
    size = f", {facts['size_bytes']:,} bytes" if "size_bytes" in facts else ""
    if "created_s" in facts:
        created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts["created_s"]))
        yield f"{path}: artifact of kind {facts['kind']}, {facts['num_files']:,} files{size}, made {created}"
    elif "kind" in facts:
        rows = f", {facts['num_rows']:,} rows" if "num_rows" in facts else ""
        yield f"{path}: {facts['kind']}{rows}{size}" + (f"; see `{facts['more']}`" if "more" in facts else "")
    for part in ("content", "settings"):
        for name, value in facts.get(part, {}).items():
            yield f"  {part}.{name}: {_shorten_value(value)}"
    yield from _format_origins(facts.get("made_from", []), 1)
    if work := facts.get("unfinished"):
        changed = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(work["changed_s"]))
        # the artifact is complete; its work was kept, since a later command may continue it
        state = "kept" if facts.get("created_s", 0.0) >= work["changed_s"] else "unfinished"
        yield (f"{path}: {state} work of `{work['made_by']}` in {work['folder']}: {work['num_done']:,} "
               f"pieces, {work['size_bytes']:,} bytes, last changed {changed}; the same command resumes, "
               "--clear deletes it")
        for name, value in work["identity"].items():
            yield f"  identity.{name}: {_shorten_value(value)}"


def _format_origins(origins: list[dict[str, Any]], depth: int) -> Iterator[str]:
    for origin in origins:
        yield f"{'  ' * depth}made from {origin['kind']} {origin['path']} ({origin['state']})"
        yield from _format_origins(origin["made_from"], depth + 1)


def _shorten_value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}... ({len(text):,} characters)"


def _clear_unfinished_work(path: Path) -> str:
    work = work_folder(path)
    if not work.is_dir():
        raise UserError(f"--clear: no work on {path} is unfinished")
    # Hold the work's lock: a running command must not lose files.
    with lock_folder(work, path), translate_disk_errors(work):
        delete_work(path)
    return f"{path}: its unfinished work is deleted"
