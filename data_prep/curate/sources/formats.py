"""The formats that sources may have, each loaded when a source asks for it; folders of mixed files are
read each as its ending says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits
from data_prep.curate.sources.reader import FileReader, format_file_name, list_source_files, raise_no_files
from data_prep.curate.sources.source import (
    NO_FORMAT, BrokenRecord, RawDocument, Reader, SourcePiece, SourceSettings)
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
    "html": "data_prep.curate.sources.html:HtmlReader",
    "warc": "data_prep.curate.sources.warc:WarcReader",
    "pdf": "data_prep.curate.sources.pdf:PdfReader",
    "code": "data_prep.curate.sources.code:CodeReader",
}
"""Name in pipeline files -> module:class of its reader."""
_PAGES = ("resiliparse", "charset_normalizer")
LIBRARIES: dict[str, tuple[str, ...]] = {
    "html": _PAGES, "pdf": ("pypdfium2",), "warc": ("warcio", "pypdfium2", *_PAGES),
    "code": ("charset_normalizer",), "auto": ("warcio", "pypdfium2", *_PAGES),
}
"""Format -> modules that the process which reads imports; without one every file would be told as broken."""


def load_reader_class(format_: str) -> type[FileReader]:
    """Return the reader of a format of `FORMATS`.

    Raises:
        UserError: a library that it needs is not installed.
    """
    found: type[FileReader] = load_built_in(f"format {format_}", FORMATS[format_], "data")
    return found


def create_reader(source: SourceSettings) -> Reader:
    """Return the reader of a source.

    Raises:
        SettingsError: the source has problems; all of them.
    """
    if problems := find_all_problems(source):
        raise SettingsError(f"source {source.name}", problems)
    return load_reader_class(source.format)(source)


def find_format_problems(format_: str, options: Mapping[str, Any]) -> list[SettingsProblem]:
    if format_ not in FORMATS:
        close = suggest_successor(format_, PIPELINE) or suggest_name(format_, FORMATS)
        return [SettingsProblem(ProblemCode.CHOICE, "format", f"must be one of {', '.join(FORMATS)}", format_,
                                close.removeprefix("; "))]
    def suggest_key(key: str) -> str:
        return suggest_successor(f"{format_}.{key}", PIPELINE).removeprefix("; ")

    problems = try_parse_settings(load_reader_class(format_).Options, options, suggest_key)[1]
    return [*map(to_problem, find_library_problems(f"format {format_}", *LIBRARIES.get(format_, ()))),
            *(problem.with_prefix("options") for problem in problems)]


AUTO_FORMATS = ("text", "jsonl", "parquet", "html", "warc", "pdf", "code")
"""Formats that endings tell, the first that takes a name; the others have to be asked for."""


class AutoReader(FileReader):
    """Files of several formats, with each format's own options at their defaults."""

    format = "auto"
    version = 3  # text of pages and PDFs as their readers give it
    Options = EncodingLimits

    def list_pieces(self) -> list[SourcePiece]:
        """Return the parts of the source, in order.

        Raises:
            UserError: there is nothing to read, or a file that the settings name has an ending of no format.
        """
        readers = self._readers()
        # A file that the settings name is wanted: what cannot be read of it is an error and not a file passed
        # over.
        named = {os.path.abspath(self.source.folder / path) for path in self.source.path}
        found: list[SourcePiece] = []
        left_out: list[SourcePiece] = []
        names = list(list_source_files(self.source, lambda name: True, left_out, self.notes.append))
        # Beside files of records, a README or a licence describes them and is no document.
        is_dataset = any(map(is_records, names))
        for name in names:
            is_named = os.fspath(self.source.get_file(name)) in named
            if is_dataset and is_description(name) and not is_named:
                found.append(SourcePiece(NO_FORMAT, name, 0, 0, 0))
            # The first format that takes a name has it: code comes last, since many endings are also those of
            # text.
            elif reader := next((r for r in readers if r.accepts_name(name)), None):
                found += reader.split_file(name)
            elif is_named:
                raise UserError(f"source {self.source.name}: {name}: has an ending of no format; set format, "
                                "or convert it to text, JSON lines or Parquet first")
            else:
                found.append(SourcePiece(NO_FORMAT, name, 0, 0, 0))
        if all(piece.format == NO_FORMAT for piece in found):
            raise_no_files(self.source)
        return found + left_out

    def read_piece(self, piece: SourcePiece) -> Iterator[RawDocument | BrokenRecord]:
        """Yield what a piece holds, in order; of a file of no format, that it is passed over."""
        if piece.format == NO_FORMAT and not self.source.get_file(piece.file).is_file():
            yield from super().read_piece(piece)
            return
        if piece.format == NO_FORMAT:
            if is_description(piece.file):
                yield BrokenRecord(format_file_name(piece.file), format_file_name(piece.file), "about",
                             "describes a dataset and is no part of it; to read it, give it a source of its "
                             "own", is_left_out=True)
                return
            ending = format_file_name(PurePosixPath(piece.file).suffix) or "none"
            yield BrokenRecord(format_file_name(piece.file), format_file_name(piece.file), "ending",
                         f"has an ending ({ending}) of no format that `auto` reads; to read it, give it a "
                         "source that says its format, or convert it to text, JSON lines or Parquet first",
                         is_left_out=True)
            return
        yield from next(r for r in self._readers() if r.format == piece.format).read_piece(piece)

    def _readers(self) -> list[FileReader]:
        return [load_reader_class(name)(self.source) for name in AUTO_FORMATS]
