"""Reader `documents`: pieces of documents as items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.synth.functions.texts import ID_CHARS, IdentifiableLanguage
from data_prep.synth.requests import Temperature
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents import Document, RecordReading, list_files, read_documents
from megatron_sov.base.documents.files import cut_text
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, at_most_field


@dataclass(frozen=True)
class DocumentSettings:
    """Settings of generators that start from documents."""

    language: IdentifiableLanguage = ""
    """Language of the output, as an ISO 639-1 code such as ko; empty: the language of each document."""
    text_field: str = "text"
    """Field of a record that holds the document."""
    min_piece_bytes: Annotated[AtLeastOne, at_most_field("max_piece_bytes")] = 200
    """Shorter documents, and shorter last pieces, are left out."""
    max_piece_bytes: AtLeastOne = 12_000
    """Longer documents are cut at blank lines, lines or blanks, and each piece is an item."""
    licence: str = ""
    """Licence of the documents, for the provenance of samples."""
    temperature: Temperature = 0.7
    """Sampling temperature of the writer; checks use 0."""
    max_tokens: AtLeastOne = 4096
    """Longest answer; an answer that is cut off there is rejected."""


def read_document_items(inputs: Sequence[Path], settings: DocumentSettings) -> Iterator[GeneratorItem]:
    """Yield the pieces of all documents as items with the field `text`, each text once.

    Raises:
        UserError: a file is unreadable or holds other records, or no piece is long enough.
    """
    seen: set[int] = set()
    reading = RecordReading(kind="text", text_field=settings.text_field)
    for path in inputs:
        for document in _read_documents(path, reading):
            for piece in cut_text(document.text, settings.max_piece_bytes):
                text = piece.strip()
                if len(text.encode()) < settings.min_piece_bytes:
                    continue
                digest = hashlib.sha256(text.encode()).hexdigest()
                # 64 bits of the hash keep the set small over millions of pieces
                number = int(digest[:16], 16)
                if number not in seen:
                    seen.add(number)
                    yield GeneratorItem(digest[:ID_CHARS], {"text": text}, path.name, settings.licence)
    if not seen:
        raise UserError(f"--input {', '.join(map(str, inputs))}: holds no document of "
                        f"{settings.min_piece_bytes} bytes or more; pass documents, or lower min_piece_bytes")


def _read_documents(path: Path, reading: RecordReading) -> Iterator[Document]:
    try:
        yield from read_documents(list_files(path), reading)
    except UserError as e:  # name the setting instead of the option of other commands
        raise UserError(str(e).replace("--text-field", "--set text_field=NAME")) from None
