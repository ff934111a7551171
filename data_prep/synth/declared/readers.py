"""Readers of a declared generator's items: documents, problems and their pairs, queries, records, texts.

A reader declares the fields that it gives to the steps, and settings that every generator on it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Le, MinLen

from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem, Temperature
from data_prep.synth.generators.documents import ID_CHARS, DocumentSettings, document_items, fenced
from data_prep.synth.generators.queries import QuerySettings, constraints_file, query_items
from data_prep.synth.generators.texts import ToldApart, language_name, sure_language
from data_prep.synth.problems import line_files, read_problems, stated_id
from megatron_sov.base.documents import RecordReading, list_files, read_documents
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import UNIQUE_ITEMS, AtLeastOne, Bound, ProblemCode

LANGUAGE_CHARS = 2000
"""Of texts, that their language is told by."""


@dataclass(frozen=True)
class DrawSettings:
    """How a model is asked."""

    temperature: Temperature = 0.7
    """Of what is written."""
    max_tokens: AtLeastOne = 4096
    """That an answer may have."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first; None: as it does by itself."""


@dataclass(frozen=True)
class Reader:
    """Reads items."""

    items: Callable[[Sequence[Path], Any], Iterator[GeneratorItem]]
    """Inputs and settings -> items; raises UserError for an input that it does not take."""
    fields: tuple[str, ...]
    """Fields of an item, as steps know them."""
    Settings: type[Any] = DrawSettings
    prepare: Callable[[GeneratorItem, Any], dict[str, Any]] = lambda item, settings: dict(item.fields)
    """Item and settings -> its fields."""
    files: Callable[[Any], Sequence[Path]] = lambda settings: ()
    """Settings -> files beside the input that items depend on."""
    needs_input: bool = True


@dataclass(frozen=True)
class RecordOptions:
    """Options of the reader `records`, in the generator's file."""

    fields: Annotated[tuple[Annotated[str, Bound(lambda name: None if name.isidentifier() else (
        ProblemCode.BOUND, "must be a name of letters, digits and _", ""))], ...], MinLen(1), UNIQUE_ITEMS]
    """Fields that each line has, as text."""
    objects: tuple[str, ...] = ()
    """Fields that each line has, as JSON objects."""
    default: str = ""
    """File beside the generator's whose lines are read where no input is given."""
    times: str = ""
    """Setting: items that each line becomes, whose field `number` counts from 1; empty: one."""

    def reader(self, folder: Path) -> Reader:
        """Return the reader; `folder`: of the generator's file."""
        files = [folder / self.default] if self.default else []
        number = ("number",) if self.times else ()
        return Reader(lambda inputs, settings: self._items(inputs or files, settings),
                      (*self.fields, *self.objects, *number), files=lambda settings: files,
                      needs_input=not files)

    def _items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        """Yield an item of each line of JSON with these fields, or as many as the setting `times` says."""
        seen: dict[str, str] = {}
        for file in line_files(inputs):
            for where, record in read_objects(file):
                fields: dict[str, Any] = {name: record.get(name) for name in (*self.fields, *self.objects)}
                for name, value in fields.items():
                    kind, form = (str, "text") if name in self.fields else (dict, "an object")
                    if not isinstance(value, kind):
                        raise UserError(f"{where}: {name} = {str(value)[:60]!r} must be {form}; add it, or "
                                        "leave the line out")
                content = (value if name in self.fields else json.dumps(value, sort_keys=True)
                           for name, value in fields.items())
                id_ = stated_id(record, "\n".join(content), where)
                if seen.setdefault(id_, where) != where:
                    continue
                # a sample of an earlier generator has its origin beside its record
                made = record.get("synthetic")
                origin = made if isinstance(made, dict) else record
                source = str(origin.get("source") or file.stem)
                licence = str(origin.get("licence") or origin.get("license") or "")
                if not self.times:
                    yield GeneratorItem(id_, fields, source, licence)
                    continue
                for number in range(1, getattr(settings, self.times) + 1):
                    yield GeneratorItem(f"{id_}.{number}", {**fields, "number": number}, source, licence)


def _prepare_document(item: GeneratorItem, settings: DocumentSettings) -> dict[str, Any]:
    source = item.fields["text"]
    found = sure_language(source)
    language = settings.language or found
    return {"source": source, "document": fenced(source), "source_language": found,
            "language": language, "language_name": language_name(language)}


@dataclass(frozen=True)
class TextSettings(DocumentSettings):
    """Settings of `texts`."""

    form: Literal["text", "chat", "prompt"] = "text"
    """Form of the input and the output: documents with text, chats with messages, prompts."""
    source_language: ToldApart = ""
    """Of the input; empty: as each document reads."""


def _text_items(inputs: Sequence[Path], settings: TextSettings) -> Iterator[GeneratorItem]:
    """Yield documents, or the messages of chats or prompts, each once."""
    if not settings.language:
        raise UserError("generator: language is empty; name the language of the output, such as "
                        "--set language=ko")
    if settings.form == "text":
        yield from document_items(inputs, settings)
        return
    seen: set[str] = set()
    reading = RecordReading(kind=settings.form)
    for path in inputs:
        for document in read_documents(list_files(path), reading):
            fields = {"messages": [message.to_dict() for message in document.messages],
                      "beside": json.loads(document.extra or "{}"), "has_tools": bool(document.tools)}
            told = json.dumps(fields, ensure_ascii=False, sort_keys=True)
            key = hashlib.sha256(told.encode()).hexdigest()[:ID_CHARS]
            if key not in seen:
                seen.add(key)
                yield GeneratorItem(key, fields, path.name, settings.licence)


def _prepare_texts(item: GeneratorItem, settings: TextSettings) -> dict[str, Any]:
    messages = item.fields.get("messages", [])
    texts = [item.fields["text"]] if "text" in item.fields else [one["content"] for one in messages]
    has_more = any(set(message) > {"role", "content"} for message in messages)
    return {"texts": texts, "messages": messages, "beside": item.fields.get("beside", {}),
            "has_more": item.fields.get("has_tools", False) or has_more,
            "longest": max(len(text.encode()) for text in texts), "language": settings.language,
            "source_language": settings.source_language or sure_language("\n".join(texts)[:LANGUAGE_CHARS])}


@dataclass(frozen=True)
class PairSettings(DrawSettings):
    """Settings of `pairs`."""

    per_problem: Annotated[AtLeastOne, Le(1000)] = 4
    """Problems that each is compared with, about."""


def _pair_items(inputs: Sequence[Path], settings: PairSettings) -> Iterator[GeneratorItem]:
    """Yield pairs of problems: in the order of hashes they form a ring, and each meets those after it."""
    # in order of hashes, so that neighbours do not come from one source
    ring = sorted(read_problems(inputs), key=lambda item: hashlib.sha256(item.id.encode()).digest())
    if len(ring) < 2:
        raise UserError(f"{', '.join(map(str, inputs))}: holds {len(ring)} problems; pairs need two")
    pairs: set[tuple[str, str]] = set()
    # half of them: each pair counts for both of its problems
    for step in range(1, min((settings.per_problem + 1) // 2, len(ring) - 1) + 1):
        for place, one in enumerate(ring):
            other = ring[(place + step) % len(ring)]
            # in a small ring a pair comes again from its other side
            if (other.id, one.id) in pairs:
                continue
            pairs.add((one.id, other.id))
            joined = hashlib.sha256(f"{one.id}\n{other.id}".encode()).hexdigest()[:16]
            yield GeneratorItem(joined, {"first_id": one.id, "first": one.fields["problem"],
                                         "second_id": other.id, "second": other.fields["problem"]},
                                one.source, one.licence)


READERS: Mapping[str, Reader] = {
    "documents": Reader(document_items, ("source", "document", "source_language", "language",
                                         "language_name"), DocumentSettings, _prepare_document),
    "pairs": Reader(_pair_items, ("first_id", "first", "second_id", "second"), PairSettings),
    "problems": Reader(
        lambda inputs, settings: read_problems(
            inputs, needs_answer="add it: a model's answers are compared with it"),
        ("problem", "answer", "choices", "domain")),
    "queries": Reader(
        query_items, ("query", "constraint", "functions", "language_name"), QuerySettings,
        lambda item, settings: {**item.fields, "language_name": language_name(settings.language)},
        lambda settings: [constraints_file(settings)]),
    "texts": Reader(_text_items, ("texts", "messages", "beside", "has_more", "longest", "source_language",
                                  "language"), TextSettings, _prepare_texts)}
"""Name in a generator's file -> reader, besides `records`, which has options."""
