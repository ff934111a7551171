"""Readers for generator files: documents, problems, pairs, queries, records, texts.

A reader declares the fields that steps see, and the settings of every generator that uses the reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Le, MinLen

from data_prep.synth.functions.texts import (
    ID_CHARS, IdentifiableLanguage, fence_text, get_language_name, identify_certain_language)
from data_prep.synth.readers.problems import get_record_id, list_line_files, read_problems
from data_prep.synth.readers.queries import QuerySettings, get_constraints_file, read_query_items
from data_prep.synth.requests import Temperature
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents import Document, RecordReading, list_files, read_documents
from megatron_sov.base.documents.files import cut_text
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import UNIQUE_ITEMS, AtLeastOne, at_most_field, require_that

LANGUAGE_CHARS = 2000
"""Characters for identifying the language in `texts` items."""


@dataclass(frozen=True)
class DrawSettings:
    """Sampling settings."""

    temperature: Temperature = 0.7
    """Sampling temperature."""
    max_tokens: AtLeastOne = 4096
    """Longest answer."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first; None: the model's default."""


@dataclass(frozen=True)
class Reader:
    """Reads items from inputs."""

    read_items: Callable[[Sequence[Path], Any], Iterator[GeneratorItem]]
    """(inputs, settings) -> items; raises `UserError` for an unsupported input."""
    fields: tuple[str, ...]
    """Fields of an item that steps see."""
    Settings: type[Any] = DrawSettings
    prepare_fields: Callable[[GeneratorItem, Any], dict[str, Any]] = lambda item, settings: dict(item.fields)
    """(item, settings) -> fields."""
    list_files: Callable[[Any], Sequence[Path]] = lambda settings: ()
    """Settings -> files, in addition to the input, that items depend on."""
    needs_input: bool = True


@dataclass(frozen=True)
class RecordOptions:
    """Options for `records` in a generator file."""

    fields: Annotated[tuple[Annotated[str, require_that(
        str.isidentifier, "must be a name of letters, digits and _")], ...], MinLen(1), UNIQUE_ITEMS]
    """Text fields in each line."""
    objects: tuple[str, ...] = ()
    """JSON object fields in each line."""
    default: str = ""
    """File next to the generator file, read if there is no `--input`."""
    times: str = ""
    """Setting with the number of items per line, numbered from 1 in `number`; "": a single item."""

    def build_reader(self, folder: Path) -> Reader:
        """Build the reader for a generator file in `folder`."""
        files = [folder / self.default] if self.default else []
        number = ("number",) if self.times else ()
        return Reader(lambda inputs, settings: self._read_items(inputs or files, settings),
                      (*self.fields, *self.objects, *number), list_files=lambda settings: files,
                      needs_input=not files)

    def _read_items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        for file in list_line_files(inputs):
            for place, record in read_records(file):
                fields = self._read_fields(record, place)
                content = (json.dumps(value, sort_keys=True) if name in self.objects else value
                           for name, value in fields.items())
                item_id = get_record_id(record, "\n".join(content), place)
                # samples in kept.jsonl hold their origin in `synthetic`
                provenance = record.get("synthetic")
                origin = provenance if isinstance(provenance, dict) else record
                source = str(origin.get("source") or file.stem)
                licence = str(origin.get("licence") or origin.get("license") or "")
                if not self.times:
                    yield GeneratorItem(item_id, fields, source, licence)
                    continue
                for number in range(1, getattr(settings, self.times) + 1):
                    yield GeneratorItem(f"{item_id}.{number}", {**fields, "number": number}, source, licence)

    def _read_fields(self, record: Mapping[str, Any], place: str) -> dict[str, Any]:
        fields: dict[str, Any] = {name: record.get(name) for name in (*self.fields, *self.objects)}
        for name, value in fields.items():
            expected, form = (str, "text") if name in self.fields else (dict, "an object")
            if not isinstance(value, expected):
                raise UserError(f"{place}: {name} = {str(value)[:60]!r} must be {form}; add it, or leave the "
                                "line out")
        return fields


@dataclass(frozen=True)
class DocumentSettings:
    """Settings for generators that start from documents."""

    language: IdentifiableLanguage = ""
    """Output language, as an ISO 639-1 code such as ko; empty: the document's language."""
    text_field: str = "text"
    """Record field that holds the document."""
    min_piece_bytes: Annotated[AtLeastOne, at_most_field("max_piece_bytes")] = 200
    """Shorter documents, and shorter last pieces, are left out."""
    max_piece_bytes: AtLeastOne = 12_000
    """Longer documents are cut at blank lines, lines or blanks, and each piece is an item."""
    licence: str = ""
    """Licence of the documents, for provenance."""
    temperature: Temperature = 0.7
    """Sampling temperature for writing; checks use 0."""
    max_tokens: AtLeastOne = 4096
    """Longest answer; longer answers are rejected."""


def read_document_items(inputs: Sequence[Path], settings: DocumentSettings) -> Iterator[GeneratorItem]:
    """Yield document pieces as items with the field `text`; equal pieces have equal ids. Raises `UserError`:
    a file is unreadable or holds other records, or no piece is long enough."""
    has_piece = False
    reading = RecordReading(kind="text", text_field=settings.text_field)
    for path in inputs:
        for document in _read_documents(path, reading):
            for piece in cut_text(document.text, settings.max_piece_bytes):
                text = piece.strip()
                if len(text.encode()) < settings.min_piece_bytes:
                    continue
                has_piece = True
                item_id = hashlib.sha256(text.encode()).hexdigest()[:ID_CHARS]
                yield GeneratorItem(item_id, {"text": text}, path.name, settings.licence)
    if not has_piece:
        raise UserError(f"--input {', '.join(map(str, inputs))}: holds no document of "
                        f"{settings.min_piece_bytes} bytes or more; pass documents, or lower min_piece_bytes")


def _read_documents(path: Path, reading: RecordReading) -> Iterator[Document]:
    try:
        yield from read_documents(list_files(path), reading)
    except UserError as e:  # name the setting, not the option
        raise UserError(str(e).replace("--text-field", "--set text_field=NAME")) from None


def _prepare_document(item: GeneratorItem, settings: DocumentSettings) -> dict[str, Any]:
    source = item.fields["text"]
    source_language = identify_certain_language(source)
    language = settings.language or source_language
    return {"source": source, "document": fence_text(source), "source_language": source_language,
            "language": language, "language_name": get_language_name(language)}


@dataclass(frozen=True)
class TextSettings(DocumentSettings):

    form: Literal["text", "chat", "prompt"] = "text"
    """Form for input and output: documents with text, chats with messages, prompts."""
    source_language: IdentifiableLanguage = ""
    """Input language; empty: identified for each document."""


def _read_text_items(inputs: Sequence[Path], settings: TextSettings) -> Iterator[GeneratorItem]:
    """Yield documents, chats or prompts."""
    if not settings.language:
        raise UserError("generator: language is empty; name the language of the output, such as "
                        "--set language=ko")
    if settings.form == "text":
        yield from read_document_items(inputs, settings)
        return
    reading = RecordReading(kind=settings.form)
    for path in inputs:
        for document in read_documents(list_files(path), reading):
            fields = {"messages": [message.to_dict() for message in document.messages],
                      "beside": json.loads(document.extra or "{}"), "has_tools": bool(document.tools)}
            content = json.dumps(fields, ensure_ascii=False, sort_keys=True)
            item_id = hashlib.sha256(content.encode()).hexdigest()[:ID_CHARS]
            yield GeneratorItem(item_id, fields, path.name, settings.licence)


def _prepare_texts(item: GeneratorItem, settings: TextSettings) -> dict[str, Any]:
    messages = item.fields.get("messages", [])
    texts = [item.fields["text"]] if "text" in item.fields else [message["content"] for message in messages]
    has_thoughts = any(set(message) > {"role", "content"} for message in messages)
    source_language = settings.source_language
    if not source_language:
        source_language = identify_certain_language("\n".join(texts)[:LANGUAGE_CHARS])
    return {"texts": texts, "messages": messages, "beside": item.fields.get("beside", {}),
            "has_more": item.fields.get("has_tools", False) or has_thoughts,
            "longest": max(len(text.encode()) for text in texts), "language": settings.language,
            "source_language": source_language}


@dataclass(frozen=True)
class PairSettings(DrawSettings):

    per_problem: Annotated[AtLeastOne, Le(1000)] = 4
    """Approximate comparisons per problem."""


def _read_pair_items(inputs: Sequence[Path], settings: PairSettings) -> Iterator[GeneratorItem]:
    """Yield problem pairs: each problem meets the next problems on a ring sorted by hash."""
    # hash order separates problems of one source
    ring = sorted(read_problems(inputs), key=lambda item: hashlib.sha256(item.id.encode()).digest())
    if len(ring) < 2:
        raise UserError(f"{', '.join(map(str, inputs))}: holds {len(ring)} problems; pairs need two")
    pairs: set[tuple[str, str]] = set()
    # each pair counts for both problems
    num_successors = min((settings.per_problem + 1) // 2, len(ring) - 1)
    for step in range(1, num_successors + 1):
        for index, first in enumerate(ring):
            second = ring[(index + step) % len(ring)]
            # on a small ring a pair returns with exchanged sides
            if (second.id, first.id) in pairs:
                continue
            pairs.add((first.id, second.id))
            pair_id = hashlib.sha256(f"{first.id}\n{second.id}".encode()).hexdigest()[:16]
            yield GeneratorItem(pair_id, {"first_id": first.id, "first": first.fields["problem"],
                                          "second_id": second.id, "second": second.fields["problem"]},
                                first.source, first.licence)


READERS: Mapping[str, Reader] = {
    "documents": Reader(read_document_items, ("source", "document", "source_language", "language",
                                              "language_name"), DocumentSettings, _prepare_document),
    "pairs": Reader(_read_pair_items, ("first_id", "first", "second_id", "second"), PairSettings),
    "problems": Reader(
        lambda inputs, settings: read_problems(
            inputs, needs_answer="add it: a model's answers are compared with it"),
        ("problem", "answer", "choices", "domain")),
    "queries": Reader(
        read_query_items, ("query", "constraint", "functions", "language_name"), QuerySettings,
        lambda item, settings: {**item.fields, "language_name": get_language_name(settings.language)},
        lambda settings: [get_constraints_file(settings)]),
    "texts": Reader(_read_text_items, ("texts", "messages", "beside", "has_more", "longest",
                                       "source_language", "language"), TextSettings, _prepare_texts)}
"""Name in a generator file -> reader; `records` has options."""
