"""Source formats; the format `auto` chooses a reader by file ending."""

import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits
from data_prep.curate.sources.reader import FileReader, format_file_name, list_source_files, raise_no_files
from data_prep.curate.sources.source import NO_FORMAT, BrokenRecord, RawDocument, SourcePiece, SourceSettings
from data_prep.libraries import find_library_problems
from megatron_sov.base.documents.files import is_description, is_records
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.hints.removed import PIPELINE, suggest_successor
from megatron_sov.base.plugins.registry import load_built_in
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, find_all_problems, to_problem, try_parse_settings)

FORMATS: dict[str, str] = {
    "auto": "data_prep.curate.sources.formats:AutoReader",
    "text": "data_prep.curate.sources.lines:TextReader",
    "jsonl": "data_prep.curate.sources.lines:JsonlReader",
    "parquet": "data_prep.curate.sources.parquet:ParquetReader",
    "html": "data_prep.curate.sources.html:HtmlReader", "warc": "data_prep.curate.sources.warc:WarcReader",
    "pdf": "data_prep.curate.sources.pdf:PdfReader", "code": "data_prep.curate.sources.code:CodeReader"}
"""Name in pipeline files -> module:class of its reader."""
AUTO_FORMATS = ("text", "jsonl", "parquet", "html", "warc", "pdf", "code")
"""Formats that `auto` tries in this order; the first that accepts a name reads the file."""
_PAGES = ("resiliparse", "charset_normalizer")
LIBRARIES: dict[str, tuple[str, ...]] = {
    "html": _PAGES, "pdf": ("pypdfium2",), "warc": ("warcio", "pypdfium2", *_PAGES),
    "code": ("charset_normalizer",), "auto": ("warcio", "pypdfium2", *_PAGES)}
"""Format -> modules for the reading process. Without this check every file would count as broken."""


def load_reader_class(format_: str) -> type[FileReader]:
    """Import a reader in `FORMATS`. Raises `UserError`: a library for the format is not installed."""
    reader: type[FileReader] = load_built_in(f"format {format_}", FORMATS[format_], "data")
    return reader


def create_reader(source: SourceSettings) -> FileReader:
    """Create a source's reader; raise `SettingsError` with the source's problems."""
    if problems := find_all_problems(source):
        raise SettingsError(f"source {source.name}", problems)
    return load_reader_class(source.format)(source)


def find_format_problems(format_: str, options: Mapping[str, Any]) -> list[SettingsProblem]:
    if format_ not in FORMATS:
        hint = suggest_successor(format_, PIPELINE) or suggest_name(format_, FORMATS)
        return [SettingsProblem(ProblemCode.CHOICE, "format", f"must be one of {', '.join(FORMATS)}", format_,
                                hint.removeprefix("; "))]

    if missing := find_library_problems(f"format {format_}", *LIBRARIES.get(format_, ())):
        return list(map(to_problem, missing))

    def suggest_key(key: str) -> str:
        return suggest_successor(f"{format_}.{key}", PIPELINE).removeprefix("; ")

    problems = try_parse_settings(load_reader_class(format_).Options, options, suggest_key)[1]
    return [problem.with_prefix("options") for problem in problems]


class AutoReader(FileReader):
    """Reads files in several formats with default options."""

    format = "auto"
    version = 3  # follows the versions of HtmlReader, WarcReader and PdfReader
    Options = EncodingLimits

    def list_pieces(self) -> list[SourcePiece]:
        """List the source's parts in order. Raises `UserError`: an empty source, or a file in `source.path`
        with an unknown ending."""
        readers = [load_reader_class(name)(self.source) for name in AUTO_FORMATS]
        # Files in `source.path` raise an error if they have no format; files in folders are only skipped.
        required = {os.path.abspath(self.source.folder / path) for path in self.source.path}
        pieces: list[SourcePiece] = []
        left_out: list[SourcePiece] = []
        names = list_source_files(self.source, lambda name: True, left_out, self.notes)
        # In a folder of records, a README or licence describes the dataset and is no document.
        is_dataset = any(map(is_records, names))
        for name in names:
            is_required = os.fspath(self.source.get_file(name)) in required
            reader = next((reader for reader in readers if reader.accepts_name(name)), None)
            if is_dataset and is_description(name) and not is_required:
                pieces.append(SourcePiece(NO_FORMAT, name, 0, 0, 0))
            elif reader is not None:
                pieces += reader.split_file(name)
            elif is_required:
                raise UserError(f"source {self.source.name}: {name}: has an ending of no format; set format, "
                                "or convert it to text, JSON lines or Parquet first")
            else:
                pieces.append(SourcePiece(NO_FORMAT, name, 0, 0, 0))
        if all(piece.format == NO_FORMAT for piece in pieces):
            raise_no_files(self.source)
        return pieces + left_out

    def read_piece(self, piece: SourcePiece) -> Iterator[RawDocument | BrokenRecord]:
        if piece.format != NO_FORMAT:
            yield from load_reader_class(piece.format)(self.source).read_piece(piece)
        elif not self.source.get_file(piece.file).is_file():
            yield from super().read_piece(piece)
        else:
            yield self._explain_skipped(format_file_name(piece.file), is_description(piece.file))

    def _explain_skipped(self, name: str, is_readme: bool) -> BrokenRecord:
        if is_readme:
            return BrokenRecord(name, name, "about", "describes a dataset and is no part of it; to read it, "
                                "give it a source of its own", is_left_out=True)
        ending = PurePosixPath(name).suffix or "none"
        return BrokenRecord(name, name, "ending",
                            f"has an ending ({ending}) of no format that `auto` reads; to read it, give it a "
                            "source that says its format, or convert it to text, JSON lines or Parquet first",
                            is_left_out=True)
