"""Settings for a source with raw documents, and a reader's documents, broken records and pieces."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.settings import UNIQUE_ITEMS, ProblemCode, SettingsProblem, choice_from, require_that

NAME = re.compile(r"\w[\w.-]{0,59}")
SourceName = Annotated[str, require_that(
    NAME.fullmatch, "must be letters, digits, '.', '_' and '-', at most 60")]
KINDS = ("", "auto", "en", "math_code", "ko", "ja", "multilingual", "domain:finance", "domain:law",
         "domain:medicine")
"""Kinds of documents. "": unknown; "auto": the step `kind` sets it."""
NO_FORMAT = "passed over"
"""`SourcePiece.format` of a file without a format, which is counted and not read."""
_FORMATS = "data_prep.curate.sources.formats"
MAX_CONTENT_CHARS = 1000
"""Characters stored for a broken record."""


@dataclass(frozen=True)
class SourceSettings:
    """A source in a pipeline file."""

    name: SourceName
    """Name in counts, identifiers and folders."""
    path: Annotated[tuple[str, ...], MinLen(1), UNIQUE_ITEMS]
    """Files and folders, relative to `folder`."""
    folder: Path = field(default=Path(), metadata={"is_written": False})
    """Folder of the pipeline file."""
    format: str = "auto"
    """A key in `formats.FORMATS`."""
    kind: Annotated[str, choice_from(lambda: KINDS)] = ""
    """A value in `KINDS`."""
    licence: str = ""
    """SPDX expression or free text; "": unknown."""
    synthetic: bool = False
    """Whether a model wrote the text."""
    priority: int = 0
    """If two sources have the same text, the source with the higher priority keeps the text."""
    text_field: str = "text"
    """Field or column with the text of a record."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the format."""

    def problems(self) -> list[SettingsProblem]:
        problems = [SettingsProblem(ProblemCode.FILE, "path", f"does not exist ({self.folder / path})", path,
                                    "name a file or a folder")
                    for path in self.path if not (self.folder / path).exists()]
        # Imported by name, because `formats` imports this module.
        problems += import_module(_FORMATS).find_format_problems(self.format, self.options)
        return problems

    @property
    def root(self) -> Path:
        """The deepest folder with all paths; file names are relative to this folder."""
        paths = [Path(os.path.abspath(self.folder / path)) for path in self.path]
        # The parent folder for a file, because a name relative to the root must not be empty.
        return Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))

    def get_file(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True)
class SourcePiece:
    """A part for a reader to read alone; plain values for JSON."""

    format: str
    """Format, or `NO_FORMAT`; never "auto"."""
    file: str
    """Path relative to the source's `root`, with "/"."""
    start: int
    """First byte."""
    stop: int
    """End byte, exclusive."""
    size_bytes: int
    """Bytes on the disk."""
    companion_files: tuple[str, ...] = ()
    """Names of further files to read for the piece, e.g. licences."""


@dataclass(frozen=True)
class RawDocument:
    """A document from a reader."""

    text: str
    """Never empty, without lone surrogates."""
    place: str
    """File name, then ":" and the record's line, row or number; unique in the source."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """`url`, `title`, `date`, `licence`, `language_hint`, `own_id` (strings) if known, and other fields
    (plain values)."""


@dataclass(frozen=True)
class BrokenRecord:
    """An unreadable or unwanted record."""

    file: str
    place: str
    """As `RawDocument.place`."""
    code: str
    """A word for counts."""
    reason: str
    """Predicate for a sentence about the record."""
    content: str = ""
    """First `MAX_CONTENT_CHARS` characters."""
    is_left_out: bool = False
    """Whether the record is valid but unwanted, e.g. generated code."""
