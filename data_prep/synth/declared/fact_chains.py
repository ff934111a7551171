"""Chains of facts over documents, for questions of several hops: facts of `triples`, joined by names."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem, Temperature
from data_prep.synth.generators.documents.languages import ToldApart, name_of
from megatron_sov.base.documents.files import KEPT
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, at_most
from megatron_sov.judge.rewards.answers import normalized

PARTS = ("subject", "relation", "object", "sentence")
"""Parts of a fact, as `triples` keeps it beside its `document`."""
MAX_STEPS = 5_000
"""Of the search for chains from one name: names with thousands of facts would never end."""
_BRACKETS = re.compile(r"\s*[(（\[][^()（）\[\]]{0,80}[)）\]]")


@dataclass(frozen=True)
class FactSettings:
    """Which chains become questions."""

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
    temperature: Temperature = 0.7
    """Of what is written; what is checked is asked at 0."""
    max_tokens: AtLeastOne = 2048
    """That an answer may have."""


@dataclass(frozen=True)
class Fact:
    """One fact, and the document that states it."""

    subject: str
    relation: str
    object: str
    sentence: str
    document: str

    @property
    def ends(self) -> tuple[str, str]:
        """Keys of subject and object."""
        return name_key(self.subject), name_key(self.object)


class FactChains:
    """All facts of a collection of documents, as a graph from subjects to objects."""

    def __init__(self) -> None:
        self.documents: dict[str, Mapping[str, Any]] = {}
        """Document -> the record of its first fact."""
        self._facts: dict[str, list[Fact]] = defaultdict(list)
        """Key of a subject -> facts."""
        self._mentions: dict[str, frozenset[str]] = {}
        self._flat: dict[str, str] = {}

    @classmethod
    def read(cls, inputs: Sequence[Path]) -> FactChains:
        """Read output folders of `triples`, or their kept.jsonl.

        Raises:
            UserError: a line is no document with facts, or there is none.
        """
        found = cls()
        for path in inputs:
            file = path / KEPT if path.is_dir() else path
            if path.is_dir() and not file.is_file():
                raise UserError(f"{path}: has no {KEPT}; pass the output folder of `sov-data synth triples`")
            for where, record in read_objects(file):
                if not all(isinstance(record.get(part), str) for part in (*PARTS, "document")):
                    raise UserError(f"{where}: has no text in each of {', '.join(PARTS)} and document; pass "
                                    "the output of `sov-data synth triples`")
                found.add(record)
        if not found.documents:
            raise UserError(f"--input {', '.join(map(str, inputs))}: holds no fact; run `sov-data synth "
                            "triples` first")
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a fact with its document."""
        document = record["document"]
        if self.documents.setdefault(document, record) is record:
            self._flat[document] = re.sub(r"\s", "", normalized(document))
        fact = Fact(record["subject"], record["relation"], record["object"], record["sentence"], document)
        one, other = fact.ends
        if one and other and one != other:
            self._facts[one].append(fact)

    def items(self, settings: FactSettings) -> Iterator[GeneratorItem]:
        """Yield an item of each chain."""
        chains = self.chains(settings.min_hops, settings.max_hops, settings.max_per_start)
        for number, chain in enumerate(chains, 1):
            records = [self.documents[fact.document] for fact in chain]
            origins = [record.get("synthetic") for record in records]
            sources = [origin if isinstance(origin, dict) else {} for origin in origins]
            source, licence = (", ".join(dict.fromkeys(str(one.get(name) or "") for one in sources if one.get(
                name))) for name in ("source", "licence"))
            language = settings.language or str(records[0].get("language") or "") or "en"
            yield GeneratorItem(chain_id(chain), {"facts": [vars(fact) for fact in chain],
                                                  "language": language}, source, licence)
            if number == settings.max_questions:
                return

    @staticmethod
    def fields_of(item: GeneratorItem) -> dict[str, Any]:
        """Return what steps know of a chain."""
        facts: list[dict[str, str]] = item.fields["facts"]
        start, *between = [fact["subject"] for fact in facts]
        told = "\n".join(f"{i}. {fact['subject']} | {fact['relation']} | {fact['object']}: {fact['sentence']}"
                         for i, fact in enumerate(facts, 1))
        # an order that follows from the item: that of the chain would give the steps away
        documents = sorted(dict.fromkeys(fact["document"] for fact in facts),
                           key=lambda text: hashlib.sha256(f"{item.id}\n{text}".encode()).digest())
        return {"facts": told, "hops": [{part: fact[part] for part in PARTS} for fact in facts],
                "start": start, "between": between, "answer": facts[-1]["object"], "documents": documents,
                "language": item.fields["language"], "language_name": name_of(item.fields["language"])}

    def chains(self, min_hops: int, max_hops: int, max_per_start: int) -> Iterator[tuple[Fact, ...]]:
        """Yield chains of facts, each of whose objects is the subject of the next.

        No two facts that follow each other are of one document; each has one object alone; no fact leads
        from a name to one further on than the next, or back; and no document speaks of both ends.  A name
        with a digit leads no further, since years and counts meet by chance.
        """
        for start in sorted({key for facts in self._facts.values() for fact in facts for key in fact.ends}):
            if _leads_on(start):
                # by hash: those that are taken are a fair draw, and the same in each run
                yield from sorted(self._from(start, min_hops, max_hops), key=chain_id)[:max_per_start]

    def _from(self, start: str, min_hops: int, max_hops: int) -> Iterator[tuple[Fact, ...]]:
        stack: list[tuple[tuple[str, ...], tuple[Fact, ...]]] = [((start,), ())]
        for _ in range(MAX_STEPS):
            if not stack:
                return
            names, chain = stack.pop()
            # a document with both ends may answer the question alone
            if len(chain) >= min_hops and not self._mentioning(start) & self._mentioning(names[-1]):
                yield chain
            if len(chain) == max_hops or not _leads_on(names[-1]):
                continue
            for fact in self._facts.get(names[-1], ()):
                other = fact.ends[1]
                # a fact between names that do not follow each other leads past a hop
                is_short = any(self._joins(name, other) or self._joins(other, name) for name in names[:-1])
                if (other not in names and not is_short and not self._joins(other, names[-1])
                        and (not chain or chain[-1].document != fact.document)
                        and self._is_unambiguous(fact)):
                    stack.append(((*names, other), (*chain, fact)))

    def _joins(self, one: str, other: str) -> bool:
        return any(fact.ends[1] == other for fact in self._facts.get(one, ()))

    def _mentioning(self, key: str) -> frozenset[str]:
        """Return the documents in which a name stands, also as a part of another word."""
        if key not in self._mentions:
            self._mentions[key] = frozenset(one for one, text in self._flat.items() if key in text)
        return self._mentions[key]

    def _is_unambiguous(self, fact: Fact) -> bool:
        """Return whether the subject has this relation to one object: else a question has two answers."""
        relation = normalized(fact.relation)
        return len({other.ends[1] for other in self._facts[fact.ends[0]]
                    if normalized(other.relation) == relation}) == 1


def name_key(name: str) -> str:
    """Return what equal names have in common: no case, blanks, articles or brackets."""
    bare = _BRACKETS.sub(" ", name)
    return re.sub(r"\s", "", normalized(bare if bare.strip() else name))


def chain_id(chain: Sequence[Fact]) -> str:
    """Return the hash of a chain: what is said, by which sentences."""
    said = [[fact.subject, fact.relation, fact.object, fact.sentence] for fact in chain]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()[:24]


def _leads_on(key: str) -> bool:
    return len(key) > 1 and not any(c.isdigit() for c in key)
