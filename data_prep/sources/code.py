"""Repositories of code: each file a document with its language and licence; what nobody wrote is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.code_files import is_vendored, language_of, unwanted
from data_prep.sources.code_licences import (
    LICENCE_FILE,
    MAX_LICENCE_BYTES,
    header_licence,
    licence_of_text,
)
from data_prep.sources.encodings import DETECT, decode_text
from data_prep.sources.job import Job, kept
from data_prep.sources.limits import Limits, read_whole
from data_prep.sources.listing import source_files
from data_prep.sources.reader import FileReader
from data_prep.sources.source import Broken, Piece, Raw
from megatron_sov.documents import BadRecord


@dataclass(frozen=True)
class CodeOptions(Limits):
    """Options of code."""

    languages: tuple[str, ...] = ()
    """Languages that are wanted, as "python"; none: all that are known, markup and data formats too."""
    licences: tuple[str, ...] = ()
    """SPDX names of the licences that are wanted, "" for files without one; none: any."""
    keep_vendored: bool = False
    """Keep copies of other projects."""
    keep_generated: bool = False
    """Keep what a program wrote, and what was made small for browsers."""
    file_bytes: int = 1_000_000
    """Larger files are data, and left out."""


class CodeReader(FileReader):
    """Files of source code in folders, each of which is a repository or holds several."""

    format = "code"
    compressed = False
    Options = CodeOptions

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a file in a folder is read, by its name."""
        return bool(language_of(name)) and not LICENCE_FILE.match(name)

    def pieces(self) -> list[Piece]:
        """Return the files, in order, each with the licences of the folders that it stands in."""
        self._licences: dict[str, tuple[str, ...]] = {}
        left_out: list[Piece] = []
        names = source_files(self.source, self.takes, left_out, self.told.append)
        return [piece for name in names for piece in self.pieces_of(name)] + left_out

    def pieces_of(self, name: str) -> Iterator[Piece]:
        """Yield the file, with the licences that stand for it."""
        size_bytes = self.source.file(name).stat().st_size
        yield Piece(self.format, name, 0, size_bytes, size_bytes, self._beside(os.path.dirname(name)))

    def _beside(self, folder: str) -> tuple[str, ...]:
        """Return the names of the licence files of the nearest folder that has any."""
        known: dict[str, tuple[str, ...]] = self.__dict__.setdefault("_licences", {})
        if folder not in known:
            found = tuple(sorted(
                Path(folder, entry.name).as_posix() for entry in os.scandir(self.source.root / folder)
                if LICENCE_FILE.match(entry.name) and entry.is_file(follow_symlinks=False)))
            above = os.path.dirname(folder)
            known[folder] = found or (self._beside(above) if folder else ())
        return known[folder]

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield the file, or why it is left out."""
        options: CodeOptions = job.options
        language = language_of(job.piece.file)
        if options.languages and language not in options.languages:
            yield job.broken(BadRecord("language", f"is {language or 'of no known language'}"),
                             is_left_out=True)
            return
        if not options.keep_vendored and is_vendored(job.piece.file):
            yield job.broken(BadRecord("vendored", "is a copy of another project's"), is_left_out=True)
            return
        if job.piece.size_bytes > options.file_bytes:
            yield job.broken(BadRecord("large", f"has more than {options.file_bytes:,} bytes"),
                             is_left_out=True)
            return
        raw = read_whole(job.file, options)
        if b"\0" in raw:
            yield job.broken(BadRecord("binary", "is binary"), is_left_out=True)
            return
        text = decode_text(raw, DETECT)
        code, reason = unwanted(job.piece.file, text)
        if code and not options.keep_generated:
            yield job.broken(BadRecord(code, reason, content=text[:1000].encode()), is_left_out=True)
            return
        licence = header_licence(text) or _repository_licence(job)
        if options.licences and licence not in options.licences:
            yield job.broken(BadRecord("licence", f"is under {licence or 'no licence that is known'}"),
                             is_left_out=True)
            return
        yield Raw(text, job.name, kept({"licence": licence, "language_hint": language,
                                        "repository": job.piece.file.partition("/")[0]}))


def _repository_licence(job: Job) -> str:
    """Return the licences of the files beside a piece, joined as SPDX does."""
    found = []
    for name in job.piece.beside:
        try:
            if (job.root / name).stat().st_size > MAX_LICENCE_BYTES:  # read for each file beside it
                continue
            found.append(licence_of_text(decode_text(read_whole(job.root / name, job.options), DETECT)))
        except (BadRecord, OSError):
            continue
    return " AND ".join(dict.fromkeys(filter(None, found)))
