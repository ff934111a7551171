"""Readers of a declared generator's items: documents, problems, records, pairs of problems, chains of facts.

A reader declares the fields that it gives to the steps, and settings that every generator on it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Le, MinLen

from data_prep.json_lines import read_objects
from data_prep.synth.declared.fact_chains import FactChains, FactSettings
from data_prep.synth.generator import GeneratedSample, GeneratorItem, Temperature
from data_prep.synth.generators.autoif.queries import FILE as CONSTRAINTS, QuerySettings, query_items
from data_prep.synth.generators.documents.languages import ToldApart, language_of, name_of
from data_prep.synth.generators.documents.pieces import ID_CHARS, DocumentSettings, document_items, fenced
from data_prep.synth.generators.documents.verdicts import unknown_language
from data_prep.synth.problems import line_files, read_problems, stated_id
from megatron_sov.base.documents import RecordReading, list_files, read_documents
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import ONCE, AtLeastOne, Bound, ProblemCode

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
class NoOptions:
    """A reader without options."""


class Reader:
    """Reads items.

    Args:
        options: that the generator's file gives.
        folder: of the generator's file.
    """

    Settings: ClassVar[type[Any]] = DrawSettings
    Options: ClassVar[type[Any]] = NoOptions
    fields: ClassVar[tuple[str, ...]] = ()
    """Fields of an item, as steps know them."""
    needs_input = True

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder

    def names(self) -> tuple[str, ...]:
        """Return the fields of an item."""
        return self.fields

    def files(self, settings: Any) -> Sequence[Path]:
        """Return files beside the input that items depend on."""
        return ()

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        """Yield items; raises UserError for an input that this reader does not take."""
        raise NotImplementedError

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        """Return the fields of an item, or the sample that says why nothing is asked about it."""
        return dict(item.fields)


class Documents(Reader):
    """Pieces of documents whose language is known."""

    Settings = DocumentSettings
    fields = ("source", "document", "source_language", "language", "language_name")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        return document_items(inputs, settings)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        source = item.fields["text"]
        found = language_of(source)
        if not found:
            return unknown_language(source)
        language = settings.language or found
        return {"source": source, "document": fenced(source), "source_language": found,
                "language": language, "language_name": name_of(language)}


@dataclass(frozen=True)
class TextSettings(DocumentSettings):
    """Settings of `texts`."""

    form: Literal["text", "chat", "prompt"] = "text"
    """Form of the input and the output: documents with text, chats with messages, prompts."""
    source_language: ToldApart = ""
    """Of the input; empty: as each document reads."""


class Texts(Reader):
    """Documents, or the messages of chats or prompts, as lists of texts."""

    Settings = TextSettings
    fields = ("texts", "messages", "beside", "has_more", "longest", "source_language", "language")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        if not settings.language:
            raise UserError("generator: language is empty; name the language of the output, such as "
                            "--set language=ko")
        if settings.form == "text":
            yield from document_items(inputs, settings)
            return
        seen: set[str] = set()
        reading = RecordReading(kind=settings.form)
        for path, document in ((one, document) for one in inputs
                               for document in read_documents(list_files(one), reading)):
            fields = {"messages": [message.to_dict() for message in document.messages],
                      "beside": json.loads(document.extra or "{}"), "has_tools": bool(document.tools)}
            told = json.dumps(fields, ensure_ascii=False, sort_keys=True)
            key = hashlib.sha256(told.encode()).hexdigest()[:ID_CHARS]
            if key not in seen:
                seen.add(key)
                yield GeneratorItem(key, fields, path.name, settings.licence)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        messages = item.fields.get("messages", [])
        texts = [item.fields["text"]] if "text" in item.fields else [one["content"] for one in messages]
        return {"texts": texts, "messages": messages, "beside": item.fields.get("beside", {}),
                "has_more": item.fields.get("has_tools", False) or any(
                    set(message) > {"role", "content"} for message in messages),
                "longest": max(len(text.encode()) for text in texts), "language": settings.language,
                "source_language": settings.source_language
                or language_of("\n".join(texts)[:LANGUAGE_CHARS])}


@dataclass(frozen=True)
class ProblemOptions:
    """Options of `problems`."""

    needs_answer: str = ""
    """What to do about a problem without an answer; empty: an answer is not needed."""


class Problems(Reader):
    """Problems with their answers and choices."""

    Options = ProblemOptions
    fields = ("problem", "answer", "choices", "domain")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        return read_problems(inputs, needs_answer=self.options.needs_answer)


@dataclass(frozen=True)
class RecordOptions:
    """Options of `records`."""

    fields: Annotated[tuple[Annotated[str, Bound(lambda name: None if name.isidentifier() else (
        ProblemCode.BOUND, "must be a name of letters, digits and _", ""))], ...], MinLen(1), ONCE]
    """Fields that each line has, as text."""
    default: str = ""
    """File beside the generator's whose lines are read where no input is given."""
    times: str = ""
    """Setting: items that each line becomes, whose field `number` counts from 1; empty: one."""


class Records(Reader):
    """Lines of JSON with fields of text."""

    Options = RecordOptions

    def __init__(self, options: RecordOptions, folder: Path) -> None:
        super().__init__(options, folder)
        self.needs_input = not options.default

    def names(self) -> tuple[str, ...]:
        return (*self.options.fields, *(("number",) if self.options.times else ()))

    def files(self, settings: Any) -> Sequence[Path]:
        return [self.folder / self.options.default] if self.options.default else []

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        seen: dict[str, str] = {}
        for file in line_files(inputs or self.files(settings)):
            for where, record in read_objects(file):
                for name in self.options.fields:
                    if not isinstance(record.get(name), str):
                        raise UserError(f"{where}: {name} = {str(record.get(name))[:60]!r} must be text; add "
                                        "it, or leave the line out")
                fields = {name: record[name] for name in self.options.fields}
                id_ = stated_id(record, "\n".join(fields.values()), where)
                if seen.setdefault(id_, where) != where:
                    continue
                source = str(record.get("source") or file.stem)
                licence = str(record.get("licence") or record.get("license") or "")
                if not self.options.times:
                    yield GeneratorItem(id_, fields, source, licence)
                    continue
                for number in range(1, getattr(settings, self.options.times) + 1):
                    yield GeneratorItem(f"{id_}.{number}", {**fields, "number": number}, source, licence)


@dataclass(frozen=True)
class PairSettings(DrawSettings):
    """Settings of `pairs`."""

    per_problem: Annotated[AtLeastOne, Le(1000)] = 4
    """Problems that each is compared with, about."""


class Pairs(Reader):
    """Pairs of problems: in the order of hashes they form a ring, and each meets those after it."""

    Settings = PairSettings
    fields = ("first_id", "first", "second_id", "second")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
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


class Queries(Reader):
    """Prompts of users, each with a constraint that `constraints` kept."""

    Settings = QuerySettings
    fields = ("query", "constraint", "functions", "language_name")

    def files(self, settings: Any) -> Sequence[Path]:
        path = Path(settings.constraints)
        return [path / CONSTRAINTS if path.is_dir() else path]

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        return query_items(inputs, settings)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        return {**item.fields, "language_name": name_of(settings.language)}


class Chains(Reader):
    """Chains of facts that the generator `triples` kept."""

    Settings = FactSettings
    fields = ("facts", "hops", "start", "between", "answer", "documents", "language", "language_name")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        return FactChains.read(inputs).items(settings)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        return FactChains.fields_of(item)


READERS: Mapping[str, type[Reader]] = {
    "chains": Chains, "documents": Documents, "pairs": Pairs, "problems": Problems, "queries": Queries,
    "records": Records, "texts": Texts}
"""Name in a generator's file -> reader."""
