"""Folders of Hugging Face datasets: data files or what `save_to_disk` wrote, with what the card says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.job import Item, Job, kept
from data_prep.sources.limits import Limits
from data_prep.sources.lines import JsonlReader
from data_prep.sources.listing import source_files
from data_prep.sources.reader import FileReader
from data_prep.sources.source import Broken, Piece, Raw
from data_prep.sources.tables import ArrowReader, ParquetReader
from megatron_sov.documents.files import SPLITS, has_word
from megatron_sov.errors import UserError

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^(?:licen[sc]e|language):.*(?:\n[ \t-].*)*", re.MULTILINE)
"""The two that are read; a card's other entries may be long, and parsing YAML is slow."""
MAX_ENTRY_CHARS = 300
_PARTS: tuple[type[FileReader], ...] = (ParquetReader, ArrowReader, JsonlReader)


@dataclass(frozen=True)
class DatasetOptions(Limits):
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
        """Return whether a file in a folder is read, by its name."""
        return any(part.takes(name) for part in _PARTS)

    def pieces(self) -> list[Piece]:
        """Return the parts of the data files, in order, each with the dataset's card.

        Raises:
            UserError: there is nothing to read, or nothing of the configuration and split that are wanted.
        """
        found = []
        left_out: list[Piece] = []
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
                found.append(Piece(self.format, name, piece.start, piece.stop, piece.size_bytes, card))
        return found + left_out

    def _is_wanted(self, name: str) -> bool:
        parts = PurePosixPath(name)
        if self.options.config and self.options.config not in parts.parts[:-1]:
            return False
        if parts.name.startswith("cache-"):  # what `map` and `filter` left
            return False
        split = self.options.split
        words = {split}.union(*(words for words in SPLITS.values() if split in words))
        if not split or has_word(name, words):
            return True
        return "train" in words and not any(has_word(name, others) for others in SPLITS.values())

    def _card(self, name: str) -> tuple[str, ...]:
        """Return the name of the card above a file, as far as the source reaches."""
        folder = PurePosixPath(name).parent
        for above in (folder, *folder.parents):
            card = (above / CARD).as_posix()
            if self.source.file(card).is_file():
                return (card,)
        return ()

    @classmethod
    def items(cls, job: Job) -> Iterator[Item]:
        """Yield the parts of a piece, each with what the card says of all."""
        part = next((p for p in _PARTS if p.takes(job.piece.file)), JsonlReader)
        facts = _card_facts(job)
        for item in part.items(job):
            yield Item(item.place, lambda item=item: _with(facts, item.read()))  # type: ignore[misc]


def _as(reader: FileReader, part: type[FileReader]) -> FileReader:
    """Return a reader of a part's format for the same source."""
    found = part.__new__(part)
    found.source, found.options = reader.source, reader.options
    return found


def _with(facts: Mapping[str, Any], found: Iterator[Raw | Broken]) -> Iterator[Raw | Broken]:
    for one in found:
        yield Raw(one.text, one.place, {**facts, **one.columns}) if isinstance(one, Raw) else one


def _card_facts(job: Job) -> dict[str, Any]:
    """Return licence and language that the dataset's card gives in its YAML head."""
    if not job.piece.beside:
        return {}
    import yaml

    card = Path(job.root / job.piece.beside[0])
    with open(card, "rb") as f:
        head = _FRONT_MATTER.match(f.read(MAX_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n"))
    said: dict[str, Any] = {}
    for entry in _ENTRY.findall(head[1]) if head else ():
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError, TypeError):
            said.update(yaml.safe_load(entry[:MAX_ENTRY_CHARS]))
    languages = said.get("language")
    one = languages[0] if isinstance(languages, list) and len(languages) == 1 else languages
    licence = said.get("license") or said.get("licence")
    return kept({"licence": " OR ".join(map(str, licence)) if isinstance(licence, list) else licence,
                 "language_hint": one if isinstance(one, str) else ""})
