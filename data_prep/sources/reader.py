"""What all readers of files share: listing them, and reading each in a process with limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from data_prep.sources.job import Item, Job
from data_prep.sources.limits import COMPRESSED, Limits
from data_prep.sources.listing import shown, source_files
from data_prep.sources.reading_process import read_apart
from data_prep.sources.source import PASSED_OVER, Broken, Piece, Raw, SourceSettings
from megatron_sov.documents.files import why_left_out
from megatron_sov.settings import read


class FileReader:
    """A reader of files; a format says which, and what is in one of them."""

    format: ClassVar[str]
    """Its name."""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Endings of the files that are read from folders, with small letters."""
    compressed: ClassVar[bool] = True
    """Whether files may also end in `.gz` and `.zst`."""
    Options: ClassVar[type[Any]] = Limits
    """Frozen dataclass of its options, with `problems()`."""

    def __init__(self, source: SourceSettings) -> None:
        """Take a source without problems."""
        self.source = source
        # processes that only read start without pydantic
        given = source.options
        self.options: Any = read(self.Options, given, "options") if given else self.Options()
        self.told: list[str] = []

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a file in a folder is read, by its name."""
        stem, dot, suffix = name.lower().rpartition(".")
        if cls.compressed and f".{suffix}" in COMPRESSED and stem:
            stem, dot, suffix = stem.rpartition(".")
        return bool(stem) and dot + suffix in cls.suffixes

    def pieces(self) -> list[Piece]:
        """Return the parts of the source, in order."""
        left_out: list[Piece] = []
        names = source_files(self.source, self.takes, left_out, self.told.append)
        return [piece for name in names for piece in self.pieces_of(name)] + left_out

    def pieces_of(self, name: str) -> Iterator[Piece]:
        """Yield the parts of one file: itself."""
        size_bytes = self.source.file(name).stat().st_size
        yield Piece(self.format, name, 0, size_bytes, size_bytes)

    def read(self, piece: Piece) -> Iterator[Raw | Broken]:
        """Yield what a piece holds, in order, read by a process with limits; of what is left out, why."""
        if piece.format == PASSED_OVER:
            name, reason = shown(piece.file), why_left_out(self.source.file(piece.file))
            yield Broken(name, name, "left_out", reason, is_left_out=True)
            return
        job = Job(piece, self.source.root, self.source.text_field, self.options)
        yield from read_apart(job)

    @classmethod
    def items(cls, job: Job) -> Iterator[Item]:
        """Yield the parts of a piece; runs in the reading process.  The order, and how many there are, has
        to be the same each time."""
        yield Item(job.name, lambda: cls.documents(job))

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield what a piece holds that has no further parts."""
        raise NotImplementedError(cls.__name__)
