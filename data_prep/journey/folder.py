"""A pipeline's output on the disk as its readers see it: base shards, and a layer over them for each step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.journey.summary import SUMMARY, Summary, read_summary
from data_prep.shard_damage import way_out
from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError, nearest
from megatron_sov.sealed import open_parquet

PIPELINE, SHARDS, QUARANTINE = "pipeline.json", "shards", "quarantine"
OUTPUT = "output"
"""Behind the last step: documents sorted by where they go, which are no layer."""
BATCH_ROWS = 4096
_STEP_FOLDER = re.compile(r"(\d{2,})-([\w.]+)-([0-9a-f]{6,64})")
_SHARD_FILE = re.compile(r"(\d{5,})\.parquet")


@dataclass(frozen=True)
class StepFolder:
    """The layers of one step over one source."""

    number: int
    """Its place in the pipeline's file; 0 is what was read."""
    kind: str
    path: Path

    @property
    def name(self) -> str:
        """Number and kind, e.g. "03 minhash_dedup"."""
        return f"{self.number:02d} {self.kind}"

    def shard(self, number: int) -> Path:
        """Return where a shard lies."""
        return self.path / f"{number:05d}.parquet"

    def numbers(self) -> list[int]:
        """Return the numbers of the shards that are there, in order."""
        names = [_SHARD_FILE.fullmatch(p.name) for p in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(int(name[1]) for name in names if name)


@dataclass(frozen=True)
class Corpus:
    """What `sov-data run` wrote, or has written so far."""

    out: Path
    sources: dict[str, list[StepFolder]]
    """Name -> its steps in order, the first of which is what was read."""

    @staticmethod
    def open(out: Path) -> Corpus:
        """Return a run's output; where the run has not come to its end, what is there of it.

        Raises:
            UserError: it is no such folder, or is damaged.
        """
        if not is_corpus(out):
            raise UserError(f"{out}: is no output of `sov-data run`; pass the folder of its --output")
        if (out / SUMMARY).is_file():
            found = {source.name: [StepFolder(s.number, s.kind, out / s.folder) for s in source.steps]
                     for source in read_summary(out).sources}
        else:
            found = {folder.name: _newest(folder) for folder in sorted((out / SHARDS).iterdir())
                     if folder.is_dir()} if (out / SHARDS).is_dir() else {}
        return Corpus(out, {name: steps for name, steps in found.items() if steps})

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end."""
        return (self.out / SUMMARY).is_file()

    @cached_property
    def summary(self) -> Summary:
        """What its steps did, in figures."""
        return read_summary(self.out)

    def steps(self, source: str) -> list[StepFolder]:
        """Return the steps of a source.

        Raises:
            UserError: there is no such source.
        """
        if source not in self.sources:
            names = visible(", ".join(self.sources)) or "none yet"
            raise UserError(f"{self.out}: has no source {source!r} (sources: {names})"
                            f"{nearest(source, self.sources)}")
        return self.sources[source]


def is_corpus(out: Path) -> bool:
    """Return whether a folder is the output of a pipeline, complete or not."""
    return (out / PIPELINE).is_file() or ((out / SUMMARY).is_file() and (out / SHARDS).is_dir())


def _newest(folder: Path) -> list[StepFolder]:
    """Return a source's steps where no summary names them: of several addresses of a step the newest."""
    found: dict[int, tuple[int, StepFolder]] = {}
    for path in folder.iterdir():
        named = _STEP_FOLDER.fullmatch(path.name)
        if named and named[2] != OUTPUT and path.is_dir():
            number, time_ns = int(named[1]), path.stat().st_mtime_ns
            if number not in found or time_ns > found[number][0]:
                found[number] = time_ns, StepFolder(number, named[2], path)
    return [found[number][1] for number in sorted(found)] if 0 in found else []


def open_shard(file: Path) -> pq.ParquetFile:
    """Open a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return open_parquet(file, _way(file))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run the pipeline again, which makes it, or restore it from a "
                        "copy") from None
    except (pa.ArrowException, OSError) as e:
        raise damage(file, str(e)) from None


def damage(file: Path, why: str) -> UserError:
    """Return the error of a shard that does not hold what it should."""
    return UserError(f"{file}: is damaged ({visible(why.splitlines()[0])[:200]}); {_way(file)}")


def _way(file: Path) -> str:
    return f"{way_out(file)} (of a complete run delete manifest.json too, so that it is done again)"


def batches(file: Path, texts: Sequence[str], others: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard.

    Args:
        file: the shard.
        texts: columns of text, which it has to have.
        others: further columns, of which those are given that it has.

    Raises:
        UserError: it is missing or damaged.
    """
    opened = open_shard(file)
    columns = opened.schema_arrow
    if odd := [name for name in texts if name not in columns.names
               or not (pa.types.is_string(columns.field(name).type)
                       or pa.types.is_large_string(columns.field(name).type))]:
        raise damage(file, f"it has no column {odd[0]!r} of text")
    wanted = [*texts, *(name for name in others if name in columns.names and name not in texts)]
    try:
        for batch in opened.iter_batches(BATCH_ROWS, columns=wanted):
            batch.validate(full=True)  # bytes that are no UTF-8 would raise where they are read
            yield batch.select(wanted)
    except (pa.ArrowException, OSError) as e:
        raise damage(file, str(e)) from None


def row_of(file: Path, row: int) -> dict[str, Any]:
    """Return one row of a shard; only the group that holds it is read.

    Raises:
        UserError: the shard is missing, damaged, or has fewer rows.
    """
    opened = open_shard(file)
    first = 0
    for group in range(opened.num_row_groups):
        size = opened.metadata.row_group(group).num_rows
        if row < first + size:
            try:
                read = opened.read_row_group(group).slice(row - first, 1)
                read.validate(full=True)
                found: dict[str, Any] = read.to_pylist()[0]
                return found
            except (pa.ArrowException, OSError, ValueError) as e:
                raise damage(file, str(e)) from None
        first += size
    raise damage(file, f"{first:,} rows, and the document is row {row:,} of its shard")
