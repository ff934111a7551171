"""Generators that make something of each document: how they begin."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, Kind
from data_prep.synth.generators.documents.languages import language_of
from data_prep.synth.generators.documents.pieces import DocumentSettings, document_items
from data_prep.synth.generators.documents.verdicts import unknown_language


class OfDocuments(Generator):
    """Makes samples of each document whose language is sure."""

    kind: Kind = "text"
    libraries: ClassVar[Sequence[str]] = ("py3langid",)
    settings: DocumentSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the pieces of the documents; raises UserError as `document_items` does."""
        return document_items(inputs, self.settings)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield what is made of a document, or why nothing is asked about it."""
        source: str = item.fields["text"]
        language = language_of(source)
        if language:
            yield from self.made(source, language, item.id, ask)
        else:
            yield unknown_language(source)

    @abstractmethod
    def made(self, source: str, source_language: str, group: str, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield what is made of a document.

        Args:
            source: its text.
            source_language: as an ISO 639-1 code.
            group: of the samples.
            ask: the door to models.
        """
