"""What a source of raw documents is, and what its readers give: pieces to read on their own, documents, and
what could not be read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import MinLen

from megatron_sov.base.settings import UNIQUE_ITEMS, Bound, ProblemCode, SettingsProblem, choice_from

NAME = re.compile(r"\w[\w.-]{0,59}")
SourceName = Annotated[str, Bound(lambda name: None if NAME.fullmatch(name) else (
    ProblemCode.BOUND, "must be letters, digits, '.', '_' and '-', at most 60", ""))]
KINDS = ("", "auto", "en", "math_code", "ko", "ja", "multilingual", "domain:finance", "domain:law",
         "domain:medicine")
"""What a source's documents may be; "" is unknown, "auto" is told by the step `kind`."""
NO_FORMAT = "passed over"
"""Stands for the format of a file that no format takes: it is counted, and nothing of it is read."""
_FORMATS = "data_prep.curate.sources.formats"
MAX_CONTENT_CHARS = 1000
"""What is kept of the content of something broken."""


@dataclass(frozen=True)
class SourceSettings:
    """One source of a pipeline file."""

    name: SourceName
    """Name in counts, identifiers and folders."""
    path: Annotated[tuple[str, ...], MinLen(1), UNIQUE_ITEMS]
    """Files and folders, relative to `folder`."""
    folder: Path = field(default=Path(), metadata={"is_written": False})
    """Where the pipeline file lies."""
    format: str = "auto"
    """One of `formats.FORMATS`."""
    kind: Annotated[str, choice_from(lambda: KINDS)] = ""
    """One of `KINDS`."""
    licence: str = ""
    """SPDX expression or free words; "" is unknown."""
    synthetic: bool = False
    """Whether a model wrote it."""
    priority: int = 0
    """Of two sources that hold the same text the one with the higher priority keeps it."""
    text_field: str = "text"
    """Field, or column, that holds the text of a record."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the format."""

    def problems(self) -> list[SettingsProblem]:
        found = [SettingsProblem(ProblemCode.FILE, "path", f"does not exist ({self.folder / path})", path,
                                 "name a file or a folder")
                 for path in self.path if not (self.folder / path).exists()]
        # by its name, since formats are made of sources and not the other way round
        return found + import_module(_FORMATS).find_format_problems(self.format, self.options)

    @property
    def root(self) -> Path:
        """The folder that names of files are relative to: the one that all paths lie in."""
        paths = [Path(os.path.abspath(self.folder / path)) for path in self.path]
        # Of a file its folder: names below a root are never empty.
        return Path(os.path.commonpath([p if p.is_dir() else p.parent for p in paths]))

    def get_file(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True)
class SourcePiece:
    """A part of a source that can be read on its own; plain values, which JSON holds."""

    format: str
    """Format to read it as, or `PASSED_OVER`; never "auto"."""
    file: str
    """Name of the file: its path below the source's `root`, with "/"."""
    start: int
    """First byte."""
    stop: int
    """Byte behind the last."""
    size_bytes: int
    """Bytes on the disk."""
    companion_files: tuple[str, ...] = ()
    """Names of further files that reading it depends on: a licence, a dataset's card, the other language."""


@dataclass(frozen=True)
class RawDocument:
    """One document as it was found."""

    text: str
    """Its text, never empty, without halves of surrogate pairs."""
    place: str
    """Its place: the file's name, and behind a ":" the line, row or number of its record; no two documents of
    a source have the same one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What it says of itself, as far as known: url, title, date, licence, language_hint, own_id (strings),
    and whatever else its format tells (plain values)."""


@dataclass(frozen=True)
class BrokenRecord:
    """What could not be read."""

    file: str
    """Name of the file."""
    place: str
    """As `Raw.place`."""
    code: str
    """One word to count by."""
    reason: str
    """One sentence."""
    content: str = ""
    """What it begins with, at most `KEPT_CHARS` characters."""
    is_left_out: bool = False
    """Whether nothing is wrong with it and it is not wanted, as generated code."""


class Reader(Protocol):
    """Reads the sources of one format."""

    notes: list[str]
    """What `pieces` passed over, in sentences."""

    def __init__(self, source: SourceSettings) -> None:
        """Take a source without problems."""

    def list_pieces(self) -> list[SourcePiece]:
        """Return the parts of the source, in a fixed order.

        Raises:
            UserError: there is nothing to read.
        """

    def read_piece(self, piece: SourcePiece) -> Iterator[RawDocument | BrokenRecord]:
        """Yield what a piece holds, in order; what is broken does not end it, and raises nothing."""
