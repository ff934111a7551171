"""`multihop`: questions whose answer takes facts from several documents, one after the other.

HyperCLOVA and Solar Open (arXiv 2601.07022, section 5.3) train on such questions about Korean culture.  The
facts are those that `triples` kept; a question is kept where a model that is given all documents of the
chain comes to its end, and with none of them alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, NoUsableReply, SampleVerdict, Temperature)
from data_prep.synth.generators.documents.answers import answer_in, stands_in
from data_prep.synth.generators.documents.customs import name_of
from data_prep.synth.generators.documents.judging import agreed
from data_prep.synth.generators.documents.languages import ToldApart, in_language
from data_prep.synth.generators.documents.pieces import fenced
from data_prep.synth.generators.documents.tagged import malformed, read_tagged
from data_prep.synth.generators.documents.verdicts import complete, until_failed
from data_prep.synth.generators.multihop_graph import FactGraph, chain_id, chains, read_facts
from data_prep.synth.generators.triples import PARTS
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, at_most

_ANSWER_TAGS = re.compile(r"</?answer>")


@dataclass(frozen=True)
class MultihopSettings:
    """Which chains become questions, and what is kept."""

    form: Literal["prompt", "chat"] = "prompt"
    """prompt: the question with `answer` beside it, for `rl generate` and the reward `stem`; chat: the
    question with the solution that came to the answer, for `sft`."""
    with_documents: bool = False
    """Set the chain's documents before the question; else it asks for what is known."""
    language: ToldApart = ""
    """Of the questions, as an ISO 639-1 code such as ko; empty: that of the chain's first document."""
    min_hops: Annotated[int, Ge(2), Le(8), at_most("max_hops")] = 2
    """Facts of a chain at least."""
    max_hops: Annotated[int, Ge(2), Le(8)] = 4
    """At most."""
    max_per_start: AtLeastOne = 4
    """Questions that begin with one name."""
    max_questions: NotNegativeInt = 0
    """In all; 0: as many as there are."""
    min_agreement: Grade = 7.0
    """Of 10, from the judge, where a solver's answer has other words than the chain's end; 0: no judge."""
    ask_without: bool = True
    """Ask each question without any document too, which is noted as `known_without`."""
    temperature: Temperature = 0.7
    """Of what is written; what is checked is asked at 0."""
    max_tokens: AtLeastOne = 2048
    """That an answer may have."""


class Multihop(Generator):
    """Makes a question of each chain."""

    name: ClassVar[str] = "multihop"
    kind: Kind = "prompt"
    help: ClassVar[str] = "questions over several documents, from the facts that triples kept"
    libraries: ClassVar[Sequence[str]] = ("py3langid",)
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "multihop/compose": ("facts", "start", "answer", "between", "num_hops", "language"),
        "multihop/solve": ("documents", "question", "language")}
    Settings: ClassVar[type[Any]] = MultihopSettings
    settings: MultihopSettings

    def __init__(self, settings: MultihopSettings) -> None:
        super().__init__(settings)
        self.kind = settings.form

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the chains of all facts; raises UserError as `read_facts` does."""
        return self.chains_of(read_facts(inputs))

    def chains_of(self, facts: FactGraph) -> Iterator[GeneratorItem]:
        """Yield the chains of facts as items."""
        settings = self.settings
        for number, chain in enumerate(chains(facts, settings.min_hops, settings.max_hops,
                                              settings.max_per_start), 1):
            used = [fact.document for fact in chain]
            origins = [facts.origins[i] for i in dict.fromkeys(used)]
            source, licence = (", ".join(dict.fromkeys(filter(None, names)))
                               for names in zip(*origins, strict=True))
            told = [vars(fact) | {"document": facts.documents[fact.document]} for fact in chain]
            language = settings.language or facts.languages[used[0]] or "en"
            yield GeneratorItem(chain_id(chain), {"facts": told, "language": language}, source, licence)
            if number == settings.max_questions:
                return

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the question of a chain."""
        settings = self.settings
        facts: list[dict[str, str]] = item.fields["facts"]
        language: str = item.fields["language"]
        start, *between = [fact["subject"] for fact in facts]
        answer = facts[-1]["object"]
        told = "\n".join(f"{i}. {fact['subject']} | {fact['relation']} | {fact['object']}: {fact['sentence']}"
                         for i, fact in enumerate(facts, 1))
        reply, = ask("multihop/compose", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     facts=fenced(told), start=start, answer=answer, between=between, num_hops=len(facts),
                     language=name_of(language))
        found = read_tagged(reply.text, "question")
        if found is None:
            yield malformed(reply, {})
            return
        question = found["question"]
        documents = in_some_order([fact["document"] for fact in facts], item.id)
        notes: dict[str, Any] = {"num_hops": len(facts)}
        verdicts = [complete(reply), *until_failed(self._checks(question, start, between, answer, documents,
                                                                language, ask, notes))]
        yield GeneratedSample(self._record(question, answer, documents, facts, language,
                                           notes.pop("solution", "")),
                              tuple(verdicts), "", notes)

    def _checks(self, question: str, start: str, between: Sequence[str], answer: str,
                documents: Sequence[str], language: str, ask: Ask, notes: dict[str, Any]
                ) -> Iterator[SampleVerdict]:
        least = self.settings.min_agreement
        yield in_language(question, language)
        yield SampleVerdict("names the start", stands_in(start, question), start)
        yield SampleVerdict("answer not in question", not stands_in(answer, question), answer)
        leaked = [name for name in between if stands_in(name, question)]
        yield SampleVerdict("steps not in question", not leaked, ", ".join(leaked))
        notes["solution"] = self._solve(question, documents, language, ask)
        given = answer_in(notes["solution"])
        yield agreed(ask, "answered with all documents", question, given, answer, language, least)
        for document in documents:
            given = answer_in(self._solve(question, [document], language, ask))
            alone = agreed(ask, "alone", question, given, answer, language, least)
            yield SampleVerdict("no document is enough", not alone.passed,
                                f"answered {given[:80]!r} with one alone")
        if self.settings.ask_without:
            given = answer_in(self._solve(question, [], language, ask))
            notes["known_without"] = agreed(ask, "known", question, given, answer, language, least).passed

    def _solve(self, question: str, documents: Sequence[str], language: str, ask: Ask) -> str:
        reply, = ask("multihop/solve", temperature=0.0, max_tokens=self.settings.max_tokens,
                     question=question, documents=[fenced(document) for document in documents],
                     language=name_of(language))
        if reply.is_cut:  # whether the documents are enough, nobody knows
            raise NoUsableReply("an answer reached the limit of tokens; see max_tokens")
        return reply.text

    def _record(self, question: str, answer: str, documents: Sequence[str],
                facts: Sequence[Mapping[str, str]], language: str, solution: str) -> dict[str, Any]:
        asked = "\n\n".join([*(documents if self.settings.with_documents else ()), question])
        hops = [{part: fact[part] for part in PARTS} for fact in facts]
        if self.settings.form == "prompt":
            return {"prompt": asked, "answer": answer, "hops": hops, "language": language}
        told = _ANSWER_TAGS.sub("", solution).strip() or answer
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}],
                "hops": hops, "language": language}


def in_some_order(documents: Sequence[str], seed: str) -> list[str]:
    """Return different documents in an order that follows from the seed, and not from the chain."""
    return sorted(dict.fromkeys(documents),
                  key=lambda document: hashlib.sha256(f"{seed}\n{document}".encode()).digest())
