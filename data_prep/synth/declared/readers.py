"""Where a declared generator's items come from: documents, problems, records, topics, risks, chains of facts.

A reader declares the fields that it gives to the steps, and settings that every generator on it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import Ge, Le, MaxLen, MinLen

from data_prep.json_lines import read_objects
from data_prep.synth.declared.fact_chains import FactChains, FactSettings
from data_prep.synth.declared.functions import languages_with_refusals
from data_prep.synth.generator import GeneratedSample, GeneratorItem, Temperature
from data_prep.synth.generators.autoif.texts import languages as named_languages
from data_prep.synth.generators.documents.languages import language_of, name_of
from data_prep.synth.generators.documents.pieces import DocumentSettings, document_items, fenced
from data_prep.synth.generators.documents.verdicts import unknown_language
from data_prep.synth.problems import line_files, read_problems, stated_id
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    ONCE, AtLeastOne, Bound, NotBlank, ProblemCode, SettingsError, SettingsProblem, one_of, problems_of,
    read_file)

TAXONOMIES = Path(__file__).parents[1] / "taxonomies"


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
    """

    Settings: ClassVar[type[Any]] = DrawSettings
    Options: ClassVar[type[Any]] = NoOptions
    fields: ClassVar[tuple[str, ...]] = ()
    """Fields of an item, as steps know them."""
    needs_input: ClassVar[bool] = True

    def __init__(self, options: Any) -> None:
        self.options = options

    def names(self) -> tuple[str, ...]:
        """Return the fields of an item."""
        return self.fields

    def files(self) -> Sequence[Path]:
        """Return packaged files that items depend on."""
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


class Records(Reader):
    """Lines of JSON with fields of text."""

    Options = RecordOptions

    def names(self) -> tuple[str, ...]:
        return tuple(self.options.fields)

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        seen: dict[str, str] = {}
        for file in line_files(inputs):
            for where, record in read_objects(file):
                for name in self.options.fields:
                    if not isinstance(record.get(name), str):
                        raise UserError(f"{where}: {name} = {str(record.get(name))[:60]!r} must be text; add "
                                        "it, or leave the line out")
                fields = {name: record[name] for name in self.options.fields}
                id_ = stated_id(record, "\n".join(fields.values()), where)
                if seen.setdefault(id_, where) == where:
                    yield GeneratorItem(id_, fields, str(record.get("source") or file.stem),
                                        str(record.get("licence") or record.get("license") or ""))


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


@dataclass(frozen=True)
class TopicSettings(DrawSettings):
    """Settings of `topics`."""

    per_topic: Annotated[AtLeastOne, Le(10_000)] = 6
    """Problems that are asked for on each topic."""


Domain = Annotated[str, Bound(lambda text: None if text and set(text) - {"."} and all(
    c.isalnum() or c in "._-" for c in text) and len(text) <= 60 else (
        ProblemCode.BOUND, "must be a name of letters, digits, '.', '_' and '-'", "such as algebra"))]


@dataclass(frozen=True)
class Topic:
    """One topic."""

    domain: Domain
    topic: Annotated[NotBlank, MaxLen(1000)]


class Topics(Reader):
    """Topics of domains, each so many times; without input those of `taxonomies/mathematics.yaml`."""

    Settings = TopicSettings
    fields = ("domain", "topic", "number")
    needs_input = False
    file = TAXONOMIES / "mathematics.yaml"

    def files(self) -> Sequence[Path]:
        return [self.file]

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        # id -> where it stood first: a topic that is repeated is passed over
        seen: dict[str, str] = {}
        for where, record in self._topics(inputs):
            for name in Topic.__dataclass_fields__:
                if not isinstance(record.get(name), str):
                    raise UserError(f"{where}: {name} = {str(record.get(name))[:60]} must be a text")
            topic = Topic(record["domain"], record["topic"])
            if problems := problems_of(topic):
                raise SettingsError(where, problems)
            id_ = stated_id(record, f"{topic.domain}\n{topic.topic}", where)
            if seen.setdefault(id_, where) != where:
                continue
            for number in range(1, settings.per_topic + 1):
                yield GeneratorItem(f"{id_}.{number}", {"domain": topic.domain, "topic": topic.topic.strip(),
                                                        "number": number}, where.rpartition(":")[0])

    def _topics(self, inputs: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not inputs:
            for domain, topics in yaml.safe_load(self.file.read_text(encoding="utf-8")).items():
                yield from ((f"{self.file.stem}:{domain}", {"domain": domain, "topic": topic})
                            for topic in topics)
        for file in line_files(inputs):
            yield from read_objects(file)


@dataclass(frozen=True)
class Category:
    """One category of risk."""

    id: Annotated[str, Bound(lambda text: None if 0 < len(text) <= 40 and text[0] != "-" and all(
        c.islower() or c.isdigit() or c == "-" for c in text) and text.isascii() else (
            ProblemCode.BOUND, "must be up to 40 small letters, digits and -", ""))]
    """Part of the samples' ids."""
    name: NotBlank
    """As prompts name it."""
    strategy: Literal["redirect", "safe-complete"]
    """redirect: decline and show a way that helps; safe-complete: help with what is safe."""
    withhold: NotBlank
    """What no answer may give."""
    examples: Annotated[tuple[NotBlank, ...], MinLen(1)]
    """Requests of the category."""
    twin: NotBlank
    """A harmless request that sounds alike."""


@dataclass(frozen=True)
class Taxonomy:
    """Categories of risk in a file."""

    categories: Annotated[tuple[Category, ...], MinLen(1)]
    version: int = 1

    def problems(self) -> list[SettingsProblem]:
        ids = [category.id for category in self.categories]
        return [SettingsProblem(ProblemCode.TWICE, f"categories.{place}.id", "stands there twice", id_)
                for place, id_ in enumerate(ids) if id_ in ids[:place]]


Known = Annotated[str, one_of(lambda: languages_with_refusals() & named_languages().keys())]
"""A language that prompts can name, and whose refusals are known."""


@dataclass(frozen=True)
class RiskSettings(DrawSettings):
    """Settings of `risks`."""

    languages: Annotated[tuple[Known, ...], MinLen(1), ONCE] = ("ko", "en", "th")
    """Of requests and answers."""
    calls: AtLeastOne = 2
    """For new requests, for each category and language."""
    max_tokens: Annotated[int, Ge(16)] = 2048
    """Of an answer; one that is longer is refused."""


class Risks(Reader):
    """Each category of risk in each language, so many times; inputs are taxonomies instead of ours."""

    Settings = RiskSettings
    fields = ("category", "language", "language_name")
    needs_input = False
    file = TAXONOMIES / "safety.yaml"

    def files(self) -> Sequence[Path]:
        return [self.file]

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        read: dict[str, Path] = {}
        for file in inputs or [self.file]:
            for category in read_file(Taxonomy, file).categories:
                # ids of items are made of those of categories
                if read.setdefault(category.id, file) != file:
                    raise UserError(f"{file}: category {category.id} stands in {read[category.id]} as well; "
                                    "rename one")
                for language in settings.languages:
                    for number in range(settings.calls):
                        yield GeneratorItem(f"{category.id}.{language}.{number}",
                                            {"category": asdict(category), "language": language}, file.name)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        return {**item.fields, "language_name": name_of(item.fields["language"])}


class Chains(Reader):
    """Chains of facts that the generator `triples` kept."""

    Settings = FactSettings
    fields = ("facts", "hops", "start", "between", "answer", "documents", "language", "language_name")

    def items(self, inputs: Sequence[Path], settings: Any) -> Iterator[GeneratorItem]:
        return FactChains.read(inputs).items(settings)

    def prepare(self, item: GeneratorItem, settings: Any) -> dict[str, Any] | GeneratedSample:
        return FactChains.fields_of(item)


READERS: Mapping[str, type[Reader]] = {
    "chains": Chains, "documents": Documents, "pairs": Pairs, "problems": Problems, "records": Records,
    "risks": Risks, "topics": Topics}
"""Name in a generator's file -> reader."""
