"""Chains of facts from several documents that no shorter way leads along."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx

from data_prep.json_lines import read_objects
from data_prep.synth.generators.triples import PARTS
from megatron_sov.base.errors import UserError
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
            fact = Fact(**{part: triple[part] for part in PARTS}, document=len(self.documents) - 1)
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
                    or not all(isinstance(t, dict) and all(isinstance(t.get(part), str) for part in PARTS)
                               for t in triples)):
                raise UserError(f"{where}: has no 'document' with 'triples' of {', '.join(PARTS)}; pass what "
                                "`sov-data synth triples` kept")
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
        found = sorted(_chains_from(facts, start, min_hops, max_hops), key=chain_id)
        yield from found[:max_per_start]


def _chains_from(facts: FactGraph, start: str, min_hops: int, max_hops: int) -> Iterator[tuple[Fact, ...]]:
    graph = facts.graph
    stack: list[tuple[tuple[str, ...], tuple[Fact, ...]]] = [((start,), ())]
    for _ in range(MAX_STEPS):
        if not stack:
            return
        names, chain = stack.pop()
        if len(chain) >= min_hops and not facts.documents_with(start) & facts.documents_with(names[-1]):
            yield chain
        if len(chain) == max_hops or not _leads_on(names[-1]):
            continue
        for _, other, data in graph.out_edges(names[-1], data=True):
            fact: Fact = data["fact"]
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
