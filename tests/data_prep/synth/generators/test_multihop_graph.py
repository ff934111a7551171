"""Chains of facts, against all that can be written down by brute force."""

from __future__ import annotations

import json
import random
from itertools import pairwise, permutations, product
from pathlib import Path

import pytest

from data_prep.synth.generators.multihop_graph import Fact, FactGraph, chains, name_key, read_facts
from megatron_sov.base.errors import UserError

NAMES = ("Aabb", "Ccdd", "Eeff", "Gghh", "Iijj", "Kkll")


def record(document: str, *triples: tuple[str, str, str]) -> dict[str, object]:
    """Return a document with its facts as `triples` keeps it."""
    return {"document": document, "language": "en", "synthetic": {"source": "s", "licence": "l"},
            "triples": [{"subject": a, "relation": r, "object": b, "sentence": f"{a} {r} {b}."}
                        for a, r, b in triples]}


def facts_of(*records: dict[str, object]) -> FactGraph:
    facts = FactGraph()
    for one in records:
        facts.add(one)
    return facts


def brute_force(facts: FactGraph, min_hops: int, max_hops: int) -> set[tuple[Fact, ...]]:
    """Return all chains that keep the rules, from all orders of names and all their facts."""
    between: dict[tuple[str, str], list[Fact]] = {}
    for one, other, data in facts.graph.edges(data=True):
        between.setdefault((one, other), []).append(data["fact"])
    texts = ["".join(text.lower().split()) for text in facts.documents]
    found = set()
    for size in range(min_hops + 1, max_hops + 2):
        for names in permutations(sorted(facts.graph), size):
            if any((a, b) in between or (b, a) in between
                   for i, a in enumerate(names) for b in names[i + 2:]):
                continue
            if any((b, a) in between for a, b in pairwise(names)):
                continue
            if any(names[0] in text and names[-1] in text for text in texts):
                continue
            for chain in product(*(between.get(pair, []) for pair in pairwise(names))):
                apart = all(a.document != b.document for a, b in pairwise(chain))
                clear = all(len({other for (one, other), known in between.items() for fact in known
                                 if one == name_key(step.subject) and fact.relation == step.relation}) == 1
                            for step in chain)
                if apart and clear:
                    found.add(chain)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_chains_are_those_of_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    records = []
    for number in range(8):
        pairs = [draw.sample(NAMES, 2) for _ in range(draw.randint(1, 2))]
        facts = [(a, draw.choice("pqr"), b) for a, b in pairs]
        mentioned = " and ".join(dict.fromkeys(name for a, _, b in facts for name in (a, b)))
        records.append(record(f"Document {number} is about {mentioned}.", *facts))
    facts = facts_of(*records)
    found = list(chains(facts, 2, 4, 10_000))
    assert len(found) == len(set(found))
    assert set(found) == brute_force(facts, 2, 4)


def test_a_chain_leads_through_documents_and_no_shorter_way_does() -> None:
    chain = (record("The song Arirang is by Kim.", ("Arirang", "is by", "Kim")),
             record("Kim was born in Busan.", ("Kim", "was born in", "Busan")))
    found, = chains(facts_of(*chain), 2, 4, 9)
    assert [fact.object for fact in found] == ["Kim", "Busan"]
    for shortcut in (record("Arirang is sung in Busan.", ("Arirang", "is sung in", "Busan")),
                     record("In Busan they like ARIRANG."),
                     record("Kim was born in Seoul.", ("Kim", "was born in", "Seoul"))):
        assert [fact.object for fact in next(chains(facts_of(*chain, shortcut), 2, 4, 9), ())] == []


def test_equal_names_are_one_and_years_are_no_way() -> None:
    assert name_key("The Han River (한강)") == name_key("han river")
    facts = facts_of(record("A began in 1443.", ("Aabb", "began in", "1443")),
                     record("1443 was hot.", ("1443", "was the year of", "Ccdd")))
    assert list(chains(facts, 2, 4, 9)) == []


def test_names_with_thousands_of_facts_end() -> None:
    names = ["n" + "x" * i for i in range(40)]
    crowd = [record(name, *[(name, f"r{other}", other) for other in names if other != name])
             for name in names]
    assert list(chains(facts_of(*crowd), 2, 4, 1)) == []  # everything is next to everything


@pytest.mark.parametrize(("content", "told"), [
    ('{"text": "a"}\n', "kept.jsonl:1: has no 'document'"), ("[]\n", "kept.jsonl:1"), ("", "holds no fact"),
    (json.dumps({"document": "a", "triples": [{"subject": 1}]}),
     "kept.jsonl:1: has no 'document' with 'triples'")])
def test_what_triples_did_not_make_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "kept.jsonl").write_text(content)
    with pytest.raises(UserError, match=told):
        read_facts([tmp_path])


def test_a_folder_without_facts_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no kept\.jsonl"):
        read_facts([tmp_path])
