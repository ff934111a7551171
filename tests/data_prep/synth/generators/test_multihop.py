"""Questions over several documents, and chains of facts against all that brute force writes down."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.generators.multihop import Fact, FactGraph, chains, name_key, read_facts
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, build, first_reason, one_of_each
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generators.multihop import MultihopSettings
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.records import parse_record
from megatron_sov.judge.rewards.answers import Stem

CASES = one_of_each("multihop")
REASONS = {
    "a sound question": "", "a step in the question": "steps not in question",
    "the answer in the question": "answer not in question", "another start": "names the start",
    "a question that stops a hop early": "judge: answered with all documents",
    "one document is enough": "no document is enough", "nobody can answer it": "answered with all documents",
    "solved, and wrongly": "judge: answered with all documents", "another language": "language",
    "no form": "form", "cut off": "complete", "an order that was followed": "names the start"}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    assert first_reason(build("multihop"), CASES[what]) in {REASONS[what], *(
        ["answer not in question"] if what == "a step in the question" else [])}


@pytest.mark.parametrize("form", ["prompt", "chat"])
def test_questions_as_prompts_and_chats(form: Any) -> None:
    generator = build("multihop", form=form, with_documents=True)
    item = CASES["a sound question"].item
    sample, = samples_of(generator, item, actor("multihop").reply)
    document = parse_record(dict(sample.record), "x", 1, RecordReading(kind=form))
    assert document.kind == form == generator.kind
    asked = document.messages[0].content
    assert all(fact["document"] in asked for fact in item.fields["facts"])
    if form == "prompt":
        row = {**sample.record, "response": f"<answer>{sample.record['answer']}</answer>"}
        assert Stem().score(row).reward == 1
    else:
        assert "<answer>" not in document.messages[1].content


def test_each_document_is_shown_alone_and_all_of_them_once() -> None:
    ask = ScriptedAsk(actor("multihop").reply)
    item = CASES["a sound question"].item
    sample, = build("multihop").make(item, ask)
    shown = [sum(fact["sentence"] in json.dumps(request, ensure_ascii=False) for fact in item.fields["facts"])
             for request in ask.requests]
    count = len(item.fields["facts"])
    assert shown == [count, count, *[1] * count, 0]
    assert sample.notes == {"num_hops": count, "known_without": False}


def test_items_come_from_what_triples_kept(tmp_path: Path) -> None:
    actor("multihop").arguments(tmp_path)
    items = list(build("multihop").items([tmp_path]))
    assert items == list(build("multihop").items([tmp_path / "kept.jsonl"]))
    assert {item.licence for item in items} == {"CC0-1.0"}
    assert items[0].source in ("songs-0, songs-1", "songs-1, songs-2", "songs-0, songs-1, songs-2")
    assert len(list(build("multihop", max_questions=2).items([tmp_path]))) == 2


def test_problems_of_settings() -> None:
    assert problems_of(MultihopSettings()) == []
    assert keys_of(MultihopSettings(form="x", min_hops=1, max_per_start=0, min_agreement=12,  # type: ignore[arg-type]
                                    temperature=-1)) == [
        "form", "min_hops", "max_per_start", "min_agreement", "temperature"]
    assert keys_of(MultihopSettings(min_hops=5)) == ["min_hops"]


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
