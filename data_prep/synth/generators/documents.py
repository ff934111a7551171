"""Documents as items: the pieces that a model is asked about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.synth.generator import GeneratorItem, Temperature
from data_prep.synth.generators.texts import ToldApart
from megatron_sov.base.documents import Document, RecordReading, list_files, read_documents
from megatron_sov.base.documents.files import cut_text
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, at_most_field

ID_CHARS = 24


@dataclass(frozen=True)
class DocumentSettings:
    """What every generator that starts from documents is told."""

    language: ToldApart = ""
    """Language of what is made, as an ISO 639-1 code such as ko; empty: that of each document."""
    text_field: str = "text"
    """Field of a record that holds the document."""
    min_piece_bytes: Annotated[AtLeastOne, at_most_field("max_piece_bytes")] = 200
    """A shorter document, or last piece of one, is left out."""
    max_piece_bytes: AtLeastOne = 12_000
    """A longer document is cut at blank lines, lines or blanks, and each piece is an item."""
    licence: str = ""
    """Of the documents, as it goes into the provenance of what is made."""
    temperature: Temperature = 0.7
    """Of what is written; what is checked is asked at 0."""
    max_tokens: AtLeastOne = 4096
    """That an answer may have; an answer that is cut off there is not kept."""


def document_items(inputs: Sequence[Path], settings: DocumentSettings) -> Iterator[GeneratorItem]:
    """Yield the pieces of all documents as items with the field `text`, each text once.

    Raises:
        UserError: a file cannot be read or holds something else, or there is not one piece.
    """
    seen: set[int] = set()
    reading = RecordReading(kind="text", text_field=settings.text_field)
    for path in inputs:
        for document in _read(path, reading):
            for piece in cut_text(document.text, settings.max_piece_bytes):
                text = piece.strip()
                if len(text.encode()) < settings.min_piece_bytes:
                    continue
                digest = hashlib.sha256(text.encode()).hexdigest()
                # 64 bits of the hash: the set stays small over millions of pieces
                if (number := int(digest[:16], 16)) not in seen:
                    seen.add(number)
                    yield GeneratorItem(digest[:ID_CHARS], {"text": text}, path.name, settings.licence)
    if not seen:
        raise UserError(f"--input {', '.join(map(str, inputs))}: holds no document of "
                        f"{settings.min_piece_bytes} bytes or more; pass documents, or lower min_piece_bytes")


def fenced(text: str) -> str:
    """Return a text between two equal lines that its writer could not know, as prompts say."""
    # made of the text itself, so that no text can hold its own closing line
    fence = f"=== {hashlib.sha256(text.encode()).hexdigest()[:ID_CHARS]} ==="
    return f"{fence}\n{text}\n{fence}"


def _read(path: Path, reading: RecordReading) -> Iterator[Document]:
    """Yield the documents of a path; sentences name the setting as this command takes it."""
    try:
        yield from read_documents(list_files(path), reading)
    except UserError as e:
        raise UserError(str(e).replace("--text-field", "--set text_field=NAME")) from None
