"""`multihop`: questions whose answer takes facts from several documents, one after the other.

HyperCLOVA and Solar Open (arXiv 2601.07022, section 5.3) train on such questions about Korean culture.  The
facts are those that `triples` kept, in chains that no shorter way leads along; a question is kept where a
model that is given all documents of the chain comes to its end, and with none of them alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import networkx as nx
from annotated_types import Ge, Le

from data_prep.json_lines import read_objects
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, NoUsableReply, SampleVerdict, Temperature)
from data_prep.synth.generators.documents.languages import ToldApart, in_language, name_of
from data_prep.synth.generators.documents.pieces import TRIPLE, fenced
from data_prep.synth.generators.documents.verdicts import (
    agreed, answer_in, complete, malformed, read_tagged, stands_in, until_failed)
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, at_most
from megatron_sov.judge.rewards.answers import normalized

KEPT = "kept.jsonl"
MAX_STEPS = 5_000
"""Of the search for chains from one name: names with thousands of facts would never end."""
_BRACKETS = re.compile(r"\s*[(（\[][^()（）\[\]]{0,80}[)）\]]")


@dataclass(frozen=True)
class Fact:
    """One fact, and the document that states it."""

    subject: str
    relation: str
    object: str
    """As the document writes them."""
    sentence: str
    """That states it."""
    document: int
    """Number of the document."""


@dataclass
class FactGraph:
    """All facts of a collection of documents, as a graph from subjects to objects."""

    documents: list[str] = field(default_factory=list)
    """Texts."""
    origins: list[tuple[str, str]] = field(default_factory=list)
    """Source and licence of each."""
    languages: list[str] = field(default_factory=list)
    """Of each."""
    graph: Any = field(default_factory=nx.MultiDiGraph)
    """Keys of names; each edge has its `fact`."""
    _mentions: dict[str, frozenset[int]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a document with its facts, a record that `triples` kept."""
        made = record.get("synthetic")
        made = made if isinstance(made, dict) else {}
        self.documents.append(record["document"])
        self.origins.append((str(made.get("source") or ""), str(made.get("licence") or "")))
        self.languages.append(str(record.get("language") or ""))
        for triple in record["triples"]:
            fact = Fact(**{part: triple[part] for part in TRIPLE}, document=len(self.documents) - 1)
            one, other = name_key(fact.subject), name_key(fact.object)
            if one and other and one != other:
                self.graph.add_edge(one, other, fact=fact)

    @cached_property
    def _flat(self) -> list[str]:
        return [re.sub(r"\s", "", normalized(text)) for text in self.documents]

    def documents_with(self, key: str) -> frozenset[int]:
        """Return the documents in which a name stands, also as a part of another word."""
        if key not in self._mentions:
            self._mentions[key] = frozenset(i for i, text in enumerate(self._flat) if key in text)
        return self._mentions[key]

    def is_unambiguous(self, fact: Fact) -> bool:
        """Return whether no other object stands behind the same subject and relation."""
        # a relation with two objects would give a question two right answers
        relation = normalized(fact.relation)
        return {other for _, other, data in self.graph.out_edges(name_key(fact.subject), data=True)
                if normalized(data["fact"].relation) == relation} == {name_key(fact.object)}


def name_key(name: str) -> str:
    """Return what equal names have in common: no case, blanks, articles or brackets."""
    bare = _BRACKETS.sub(" ", name)
    return re.sub(r"\s", "", normalized(bare if bare.strip() else name))


def read_facts(inputs: Sequence[Path]) -> FactGraph:
    """Return the facts of what `triples` kept: its output folders, or their kept.jsonl.

    Raises:
        UserError: a line is no document with facts, or there is none.
    """
    facts = FactGraph()
    for path in inputs:
        file = path / KEPT if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise UserError(f"{path}: has no {KEPT}; pass the output folder of `sov-data synth triples`")
        for where, record in read_objects(file):
            triples = record.get("triples")
            if (not isinstance(record.get("document"), str) or not isinstance(triples, list)
                    or not all(isinstance(t, dict) and all(isinstance(t.get(part), str) for part in TRIPLE)
                               for t in triples)):
                raise UserError(f"{where}: has no 'document' with 'triples' of {', '.join(TRIPLE)}; pass "
                                "what `sov-data synth triples` kept")
            facts.add(record)
    if not facts.documents:
        raise UserError(f"--input {', '.join(map(str, inputs))}: holds no fact; run `sov-data synth triples` "
                        "first")
    return facts


def chains(facts: FactGraph, min_hops: int, max_hops: int, max_per_start: int) -> Iterator[tuple[Fact, ...]]:
    """Yield chains of facts, each of whose objects is the subject of the next.

    No two facts that follow each other are of one document; each has one object alone; no fact leads from a
    name to one further on than the next, or back; and no document at all speaks of the first name and the
    last.  What has a digit is no name to go on from, since years and counts meet by chance.

    Args:
        facts: of all documents.
        min_hops: facts of a chain at least.
        max_hops: at most.
        max_per_start: chains that begin with one name.
    """
    for start in sorted(facts.graph):
        if not _leads_on(start):
            continue
        # by hash: those that are taken are a fair draw, and the same in each run
        found = sorted(_chains_from(facts, start, min_hops, max_hops), key=chain_id)
        yield from found[:max_per_start]


def _chains_from(facts: FactGraph, start: str, min_hops: int, max_hops: int) -> Iterator[tuple[Fact, ...]]:
    graph = facts.graph
    stack: list[tuple[tuple[str, ...], tuple[Fact, ...]]] = [((start,), ())]
    for _ in range(MAX_STEPS):
        if not stack:
            return
        names, chain = stack.pop()
        # a document with both ends may answer the question alone
        if len(chain) >= min_hops and not facts.documents_with(start) & facts.documents_with(names[-1]):
            yield chain
        if len(chain) == max_hops or not _leads_on(names[-1]):
            continue
        for _, other, data in graph.out_edges(names[-1], data=True):
            fact: Fact = data["fact"]
            # an edge between names that do not follow each other leads past a hop
            is_short = any(graph.has_edge(name, other) or graph.has_edge(other, name) for name in names[:-1])
            if (other not in names and not is_short and not graph.has_edge(other, names[-1])
                    and (not chain or chain[-1].document != fact.document) and facts.is_unambiguous(fact)):
                stack.append(((*names, other), (*chain, fact)))


def _leads_on(key: str) -> bool:
    return len(key) > 1 and not any(c.isdigit() for c in key)


def chain_id(chain: Sequence[Fact]) -> str:
    """Return the hash of a chain: what is said, by which sentences."""
    said = [[fact.subject, fact.relation, fact.object, fact.sentence] for fact in chain]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()[:24]


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
        settings = self.settings
        for number, chain in enumerate(chains(facts, settings.min_hops, settings.max_hops,
                                              settings.max_per_start), 1):
            used = [fact.document for fact in chain]
            # one of each document, in the order of the chain
            origins = [facts.origins[i] for i in dict.fromkeys(used)]
            source, licence = (", ".join(dict.fromkeys(filter(None, names)))
                               for names in zip(*origins, strict=True))
            told = [vars(fact) | {"document": facts.documents[fact.document]} for fact in chain]
            language = settings.language or facts.languages[used[0]] or "en"
            yield GeneratorItem(chain_id(chain), {"facts": told, "language": language}, source, licence)
            if number == settings.max_questions:
                return

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
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
        # the order of the chain would give the steps away
        documents = in_some_order([fact["document"] for fact in facts], item.id)
        notes: dict[str, Any] = {"num_hops": len(facts)}
        # checks that cost nothing come first there, and what fails is not asked on
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
        # a document that is enough alone makes a question of one hop
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
        hops = [{part: fact[part] for part in TRIPLE} for fact in facts]
        if self.settings.form == "prompt":
            return {"prompt": asked, "answer": answer, "hops": hops, "language": language}
        told = _ANSWER_TAGS.sub("", solution).strip() or answer
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}],
                "hops": hops, "language": language}


def in_some_order(documents: Sequence[str], seed: str) -> list[str]:
    """Return different documents in an order that follows from the seed, and not from the chain."""
    return sorted(dict.fromkeys(documents),
                  key=lambda document: hashlib.sha256(f"{seed}\n{document}".encode()).digest())
