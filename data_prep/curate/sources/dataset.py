"""Folders of Hugging Face datasets: data files or what `save_to_disk` wrote, with what the card says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits
from data_prep.curate.sources.lines import JsonlReader, raw_of
from data_prep.curate.sources.reader import (
    EMPTY, FileReader, ReadingJob, SourceItem, drop_empty, source_files)
from data_prep.curate.sources.source import Broken, Raw, SourcePiece
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import SPLITS, arrow_batches, has_word, open_parquet
from megatron_sov.base.errors import UserError, first_line

# Parquet and Arrow files: each row is a document.

_PART_BYTES = 64 << 20
_BATCH_ROWS = 256
_BATCH_BYTES = 64 << 20


class ParquetReader(FileReader):
    """Parquet files."""

    format = "parquet"
    suffixes = frozenset([".parquet"])
    compressed = False

    def pieces_of(self, name: str) -> Iterator[SourcePiece]:
        """Yield parts of about 64 MiB; each holds the row groups that begin in it, so that nobody has to look
        into a file to know its parts."""
        size_bytes = self.source.file(name).stat().st_size
        for start in range(0, max(size_bytes, 1), _PART_BYTES):
            stop = min(start + _PART_BYTES, size_bytes)
            yield SourcePiece(self.format, name, start, stop, stop - start)

    @classmethod
    def items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        try:
            metadata = open_parquet(job.file).metadata
            size_bytes = job.file.stat().st_size
            groups = [n for n in range(metadata.num_row_groups)
                      if job.piece.start <= _begin(metadata.row_group(n), size_bytes) < job.piece.stop]
        except BadRecord as e:
            told = [job.broken(e)] if job.piece.start == 0 else []
            yield SourceItem(job.name, lambda: iter(told))
            return
        for number in groups:
            yield SourceItem(f"{job.name}:{number}", _RowGroup(job, number))


def _begin(group: Any, size_bytes: int) -> int:
    """Return the place of a row group's first page; a file says it of each of its columns.  Where it lies,
    the group counts to the file's first part, so that one part reads or tells it."""
    column = group.column(0)
    place: int = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    return place if 0 <= place < size_bytes else 0


class _RowGroup:
    """The documents of one row group."""

    def __init__(self, job: ReadingJob, number: int) -> None:
        self._job, self._number = job, number

    def __call__(self) -> Iterator[Raw | Broken]:
        import pyarrow

        job, number = self._job, self._number
        file = open_parquet(job.file)
        group = file.metadata.row_group(number)
        # So many rows that a batch takes about 64 MiB, by the mean of the group.
        rows = _BATCH_BYTES * max(group.num_rows, 1) // max(group.total_byte_size, 1)
        done = 0
        try:
            for batch in file.iter_batches(min(max(rows, 1), _BATCH_ROWS), row_groups=[number],
                                           use_threads=False):
                yield from _documents(batch, f"{job.name}:{number}.", done, job)
                # Rows are counted over batches: places in the source do not depend on their size.
                done += batch.num_rows
        except (pyarrow.ArrowException, OSError) as e:
            raise BadRecord("parquet", f"is damaged ({first_line(e)[:200]}); what came before is "
                                       "read; fetch it again") from None


class ArrowReader(FileReader):
    """Arrow files and streams, as Hugging Face's `save_to_disk` writes them."""

    format = "arrow"
    suffixes = frozenset([".arrow", ".feather"])
    compressed = False

    @classmethod
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        done = 0
        with arrow_batches(job.file) as (_, batches):
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from _documents(batch.slice(start, _BATCH_ROWS), f"{job.name}:", done + start, job)
                done += batch.num_rows


def _documents(batch: Any, prefix: str, done: int, job: ReadingJob) -> Iterator[Raw | Broken]:
    names = batch.schema.names
    for row in range(batch.num_rows):
        place = f"{prefix}{done + row + 1}"
        try:
            yield raw_of({name: _value(batch.column(i)[row]) for i, name in enumerate(names)}, place, job)
        except BadRecord as e:
            yield job.broken(e, place, is_left_out=e.code == EMPTY)


def _value(scalar: Any) -> Any:
    """Return a value; None where Python has none for it: nanoseconds, years behind 9999, unknown time
    zones."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 ({e.reason} at byte {e.start} of a column)") from None
    except (ValueError, OverflowError, LookupError):
        return _written(scalar)
    # where pandas is installed nanoseconds are of its own types, which would be written in another way
    if hasattr(value, "nanosecond"):
        return _written(scalar) if value.nanosecond else value.to_pydatetime()
    if hasattr(value, "nanoseconds"):
        return _written(scalar) if value.nanoseconds else value.to_pytimedelta()
    return value


def _written(scalar: Any) -> str | None:
    import pyarrow

    try:
        written: str = scalar.cast(pyarrow.string()).as_py()
    except (pyarrow.ArrowException, ValueError):
        return None
    return written


CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^(?:licen[sc]e|language):.*(?:\n[ \t-].*)*", re.MULTILINE)
"""The two that are read; a card's other entries may be long, and parsing YAML is slow."""
MAX_ENTRY_CHARS = 300
_PARTS: tuple[type[FileReader], ...] = (ParquetReader, ArrowReader, JsonlReader)


@dataclass(frozen=True)
class DatasetOptions(EncodingLimits):
    """Options of datasets."""

    config: str = ""
    """Folder of one configuration; "": all of them."""
    split: str = "train"
    """Split that is read, as far as names of files and folders tell; "": all of them."""


class DatasetReader(FileReader):
    """A dataset as it lies in a repository of the Hub, or as `save_to_disk` wrote it."""

    format = "dataset"
    compressed = True
    Options = DatasetOptions

    @classmethod
    def takes(cls, name: str) -> bool:
        return any(part.takes(name) for part in _PARTS)

    def pieces(self) -> list[SourcePiece]:
        """Return the parts of the data files, in order, each with the dataset's card.

        Raises:
            UserError: there is nothing to read, or nothing of the configuration and split that are wanted.
        """
        found = []
        left_out: list[SourcePiece] = []
        names = [name for name in source_files(self.source, self.takes, left_out, self.told.append)
                 if self._is_wanted(name)]
        if not names:
            raise UserError(f"source {self.source.name}: no name of a data file says that it is of config = "
                            f"{self.options.config!r} and split = {self.options.split!r}; name others, or "
                            'write "" for all')
        for name in names:
            part = next((p for p in _PARTS if p.takes(name)), JsonlReader)
            card = self._card(name)
            for piece in part.pieces_of(_as(self, part), name):
                found.append(SourcePiece(self.format, name, piece.start, piece.stop, piece.size_bytes, card))
        return found + left_out

    def _is_wanted(self, name: str) -> bool:
        parts = PurePosixPath(name)
        if self.options.config and self.options.config not in parts.parts[:-1]:
            return False
        if parts.name.startswith("cache-"):  # what `map` and `filter` left
            return False
        split = self.options.split
        # Split names have synonyms, such as dev and validation.
        words = {split}.union(*(words for words in SPLITS.values() if split in words))
        if not split or has_word(name, words):
            return True
        # Files that name no split are taken for training data, as the Hub does.
        return "train" in words and not any(has_word(name, others) for others in SPLITS.values())

    def _card(self, name: str) -> tuple[str, ...]:
        folder = PurePosixPath(name).parent
        for above in (folder, *folder.parents):
            card = (above / CARD).as_posix()
            if self.source.file(card).is_file():
                return (card,)
        return ()

    @classmethod
    def items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        """Yield the parts of a piece, each with what the card says of all."""
        part = next((p for p in _PARTS if p.takes(job.piece.file)), JsonlReader)
        # What the card says holds where a record says nothing itself.
        facts = _card_facts(job)
        for item in part.items(job):
            yield SourceItem(item.place, lambda item=item: _with(facts, item.read()))  # type: ignore[misc]


def _as(reader: FileReader, part: type[FileReader]) -> FileReader:
    found = part.__new__(part)
    found.source, found.options = reader.source, reader.options
    return found


def _with(facts: Mapping[str, Any], found: Iterator[Raw | Broken]) -> Iterator[Raw | Broken]:
    for one in found:
        yield Raw(one.text, one.place, {**facts, **one.columns}) if isinstance(one, Raw) else one


def _card_facts(job: ReadingJob) -> dict[str, Any]:
    if not job.piece.beside:
        return {}
    import yaml

    card = Path(job.root / job.piece.beside[0])
    with open(card, "rb") as f:
        head = _FRONT_MATTER.match(f.read(MAX_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n"))
    said: dict[str, Any] = {}
    # Each entry alone: a mistake in one leaves the other.
    for entry in _ENTRY.findall(head[1]) if head else ():
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError, TypeError):
            said.update(yaml.safe_load(entry[:MAX_ENTRY_CHARS]))
    languages = said.get("language")
    one = languages[0] if isinstance(languages, list) and len(languages) == 1 else languages
    # One language is a hint; a list of several says nothing of one document.
    licence = said.get("license") or said.get("licence")
    return drop_empty({"licence": " OR ".join(map(str, licence)) if isinstance(licence, list) else licence,
                       "language_hint": one if isinstance(one, str) else ""})
