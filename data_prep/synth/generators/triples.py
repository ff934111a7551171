"""`triples`: facts that documents state, with the sentences that state them; what `multihop` starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, Kind, SampleVerdict
from data_prep.synth.generators.documents.languages import customs_of, language_of, name_of
from data_prep.synth.generators.documents.pieces import TRIPLE, DocumentSettings, document_items, fenced
from data_prep.synth.generators.documents.verdicts import (
    answer_in, are_passed, complete, malformed, read_list, stands_in, unknown_language, until_failed)
from megatron_sov.base.settings import AtLeastOne
from megatron_sov.judge.rewards.answers import normalized

MAX_NAME_CHARS = 60
"""Of a subject, a relation or an object; longer ones are clauses."""


@dataclass(frozen=True)
class TripleSettings(DocumentSettings):
    """What is extracted, and what is kept."""

    num_triples: AtLeastOne = 20
    """That are asked for, of each document."""
    verify: bool = True
    """Ask (the judge, where there is one) of each whether its sentence states it."""


class Triples(Generator):
    """Extracts the facts of each document."""

    name: ClassVar[str] = "triples"
    kind: Kind = "text"
    help: ClassVar[str] = "facts of documents with the sentences that state them: the input of multihop"
    libraries: ClassVar[Sequence[str]] = ("py3langid",)
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "triples/extract": ("document", "language", "num_triples"), "triples/verify": ("material",)}
    Settings: ClassVar[type[Any]] = TripleSettings
    settings: TripleSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the pieces of the documents; raises UserError as `document_items` does."""
        return document_items(inputs, self.settings)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the facts that do not hold, and the document with those that do."""
        settings = self.settings
        source: str = item.fields["text"]
        language = settings.language or language_of(source)
        if not language:
            yield unknown_language(source)
            return
        reply, = ask("triples/extract", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     document=fenced(source), language=name_of(language), num_triples=settings.num_triples)
        triples = read_list(reply.text, *TRIPLE)
        if triples is None or reply.is_cut:
            yield malformed(reply, {}, item.id)
            return
        kept: list[Mapping[str, str]] = []
        for triple in triples[:settings.num_triples]:
            verdicts = until_failed(self._checks(triple, kept, source, language, ask))
            if are_passed(verdicts):
                kept.append(triple)
            else:
                yield GeneratedSample({"text": fact_line(triple)}, tuple(verdicts), item.id)
        record = {"text": "\n".join(map(fact_line, kept)), "document": source, "triples": kept,
                  "language": language}
        count = SampleVerdict("number of facts", bool(kept), f"{len(kept)} of {len(triples)} are kept")
        yield GeneratedSample(record, (complete(reply), count), item.id, {"num_facts": len(kept)})

    def _checks(self, triple: Mapping[str, str], before: Sequence[Mapping[str, str]], source: str,
                language: str, ask: Ask) -> Iterator[SampleVerdict]:
        subject, thing, sentence = triple["subject"], triple["object"], triple["sentence"]
        # chains are made of names: pronouns and clauses join facts that have nothing in common
        names = (subject, triple["relation"], thing)
        yield SampleVerdict("names", all(len(name) <= MAX_NAME_CHARS and "\n" not in name for name in names)
                            and len({normalized(subject), normalized(thing), normalized(sentence)}) == 3
                            and not {normalized(subject), normalized(thing)} & customs_of(language).pronouns,
                            "one is a pronoun or a clause, or both are the same")
        yield SampleVerdict("sentence in document", stands_in(sentence, source))
        yield SampleVerdict("names in sentence", stands_in(subject, sentence) and stands_in(thing, sentence))
        yield SampleVerdict("another fact", fact_line(triple) not in map(fact_line, before))
        if self.settings.verify:
            material = fenced(f"Sentence: {sentence}\nFact: {fact_line(triple)}")
            reply, = ask("triples/verify", role="judge", temperature=0.0, material=material)
            yield SampleVerdict("judge: stated", normalized(answer_in(reply.text)) == "yes", reply.text[:80])


def fact_line(triple: Mapping[str, str]) -> str:
    return " | ".join(" ".join(triple[part].split()) for part in TRIPLE[:3])
