"""Raw files and what is known of their contents, which the plan follows from: large sources are read by jobs
of a cluster before anything is planned, and not by the machine where the command is typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.pipeline.addresses import address, hashes_of, parts_of, unknown_files
from data_prep.pipeline.pipeline_file import Pipeline
from data_prep.sources.formats import reader
from data_prep.sources.source import PASSED_OVER, Piece
from megatron_sov.obs.figures import size

READ_HERE_BYTES = 10 * 10**9
"""So much is read where the command is typed, in some seconds; of more a cluster's jobs read all."""
BATCH_BYTES, BATCH_FILES = 100 * 10**9, 10_000
"""What one job reads at most, in a few minutes."""


@dataclass(frozen=True)
class Batch:
    """Files that one job reads."""

    source: str
    files: tuple[str, ...]


def known_file(output: Path, source: str) -> Path:
    """Return where the hashes of a source's files are kept."""
    return output / "inputs" / f"{source}.json"


def input_names(pieces: Sequence[Piece]) -> list[str]:
    """Return the names of the files that pieces are read from, each once."""
    return list(dict.fromkeys(name for piece in pieces if piece.format != PASSED_OVER
                              for name in (piece.file, *piece.beside)))


def unknown_inputs(pipeline: Pipeline, output: Path) -> dict[str, dict[Path, int]]:
    """Return source -> file -> size of the files whose contents are not known.

    Raises:
        UserError: a source holds nothing, or a file cannot be looked at.
    """
    return {source.name: unknown_files([source.file(name) for name in input_names(reader(source).pieces())],
                                       known_file(output, source.name)) for source in pipeline.sources}


def is_much(unknown: Mapping[str, Mapping[Path, int]]) -> bool:
    """Return whether files are too much to be read where the command is typed."""
    return sum(map(sum, (files.values() for files in unknown.values()))) > READ_HERE_BYTES


def told(unknown: Mapping[str, Mapping[Path, int]]) -> str:
    """Return how much is not known, in words."""
    return ", ".join(f"{size(sum(files.values()))} in {len(files):,} files of source {name}"
                     for name, files in unknown.items() if files)


def batches(unknown: Mapping[str, Mapping[Path, int]]) -> Iterator[Batch]:
    """Yield files in groups of at most `BATCH_BYTES` and `BATCH_FILES`, or of one file."""
    for source, files in unknown.items():
        group: list[str] = []
        size_bytes = 0
        for file, file_bytes in files.items():
            if group and (size_bytes + file_bytes > BATCH_BYTES or len(group) >= BATCH_FILES):
                yield Batch(source, tuple(group))
                group, size_bytes = [], 0
            group.append(str(file))
            size_bytes += file_bytes
        if group:
            yield Batch(source, tuple(group))


def read_batch(batch: Batch, output: Path) -> None:
    """Read files, and leave what is known of them where the next plan finds it; what is there from an earlier
    try is not read again."""
    known = known_file(output, batch.source)
    part = parts_of(known) / f"{address({'files': batch.files})}.json"
    hashes_of([Path(file) for file in batch.files], part)
