"""Questions over several documents, and chains of facts against all that brute force writes down."""

from __future__ import annotations

import json
import random
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.declared.fact_chains import PARTS, Fact, FactChains, name_key
from data_prep.synth.known import generator_class
from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.answers import Stem
from tests.data_prep.synth.scripted import ScriptedAsk, by_system, generator, samples_of
from tests.typed_words import keys_of

NAMES = ("Aabb", "Ccdd", "Eeff", "Gghh", "Iijj", "Kkll")


Facts = list[dict[str, Any]]


def record(document: str, *triples: tuple[str, str, str]) -> Facts:
    """Return the facts of a document as `triples` keeps them."""
    return [{"document": document, "language": "en", "synthetic": {"source": "s", "licence": "l"},
             "subject": a, "relation": r, "object": b, "sentence": f"{a} {r} {b}."} for a, r, b in triples]


def chains_of(*records: Facts) -> FactChains:
    facts = FactChains()
    for one in records:
        for fact in one:
            facts.add(fact)
    return facts


def brute_force(records: list[Facts], min_hops: int, max_hops: int) -> set[tuple[Fact, ...]]:
    """Return all chains that keep the rules, from all orders of names and all their facts."""
    between: dict[tuple[str, str], list[Fact]] = {}
    for said in (fact for one in records for fact in one):
        fact = Fact(*(said[part] for part in (*PARTS, "document")))
        between.setdefault(fact.ends, []).append(fact)
    texts = ["".join(one[0]["document"].lower().split()) for one in records]
    nodes = sorted({name for pair in between for name in pair})
    found = set()
    for size in range(min_hops + 1, max_hops + 2):
        for names in permutations(nodes, size):
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
    facts = chains_of(*records)
    found = list(facts.chains(2, 4, 10_000))
    assert len(found) == len(set(found))
    assert set(found) == brute_force(records, 2, 4)


def test_a_chain_leads_through_documents_and_no_shorter_way_does() -> None:
    chain = (record("The song Arirang is by Kim.", ("Arirang", "is by", "Kim")),
             record("Kim was born in Busan.", ("Kim", "was born in", "Busan")))
    found, = chains_of(*chain).chains(2, 4, 9)
    assert [fact.object for fact in found] == ["Kim", "Busan"]
    for shortcut in (record("Arirang is sung in Busan.", ("Arirang", "is sung in", "Busan")),
                     record("In Busan they like ARIRANG.", ("Seoul", "likes", "Daegu")),
                     record("Kim was born in Seoul.", ("Kim", "was born in", "Seoul"))):
        assert [fact.object for fact in next(chains_of(*chain, shortcut).chains(2, 4, 9), ())] == []


def test_equal_names_are_one_and_years_are_no_way() -> None:
    assert name_key("The Han River (한강)") == name_key("han river")
    facts = chains_of(record("A began in 1443.", ("Aabb", "began in", "1443")),
                     record("1443 was hot.", ("1443", "was the year of", "Ccdd")))
    assert list(facts.chains(2, 4, 9)) == []


def test_names_with_thousands_of_facts_end() -> None:
    names = ["n" + "x" * i for i in range(40)]
    crowd = [record(name, *[(name, f"r{other}", other) for other in names if other != name])
             for name in names]
    assert list(chains_of(*crowd).chains(2, 4, 1)) == []  # everything is next to everything


@pytest.mark.parametrize(("content", "told"), [
    ('{"text": "a"}\n', "kept.jsonl:1: has no text in each of"), ("[]\n", "kept.jsonl:1"),
    ("", "holds no fact"), (json.dumps({"document": "a", "subject": 1}), "kept.jsonl:1: has no text")])
def test_what_triples_did_not_make_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "kept.jsonl").write_text(content)
    with pytest.raises(UserError, match=told):
        FactChains.read([tmp_path])


def test_a_folder_without_facts_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no kept\.jsonl"):
        FactChains.read([tmp_path])


CHAIN = (record("The song Arirang is by Kim.", ("Arirang", "is by", "Kim")),
         record("Kim was born in Busan.", ("Kim", "was born in", "Busan")))
QUESTION = "Where was the writer of Arirang born?"


def solver(prompt: str) -> str:
    """Come to the end where both documents are shown."""
    shown = sum(one["document"] in prompt for one, in CHAIN)
    return f"First the writer, then the place. <answer>{'Busan' if shown == 2 else 'unknown'}</answer>"


@pytest.mark.parametrize(("question", "solve", "reason"), [
    (QUESTION, solver, ""), ("Where was Kim, who wrote Arirang, born?", solver, "steps not in question"),
    ("Was the writer of Arirang born in Busan?", solver, "answer not in question"),
    ("Where was the writer of the song born?", solver, "names the start"),
    (QUESTION, "<answer>unknown</answer>", "answered with all documents"),
    (QUESTION, "<answer>Busan</answer>", "no document is enough"),
    (QUESTION, "<answer>Seoul</answer>", "judge: answered with all documents"),
    (QUESTION, {"content": "<answer>Busan", "finish_reason": "length"}, "solution ended")])
def test_a_question_takes_all_documents_of_its_chain(question: str, solve: Any, reason: str, tmp_path: Path
                                                     ) -> None:
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(one) + "\n" for one, in CHAIN))
    item, = generator("multihop").items([tmp_path])
    assert (item.source, item.licence) == ("s", "l")
    model = by_system(write_questions=f"<question>{question}</question>", answer_questions=solve, grade=2)
    sample, = samples_of(generator("multihop"), item, model)
    assert sample.reason == reason
    if not reason:
        assert sample.record["answer"] == "Busan" and len(sample.record["hops"]) == 2
        assert sample.notes == {"num_hops": 2, "known_without": False}
        row = {**sample.record, "response": "<answer>Busan</answer>"}
        assert Stem().score(row).reward == 1
        chat, = samples_of(generator("multihop", form="chat", with_documents=True), item, model)
        asked, said = (message["content"] for message in chat.record["messages"])
        assert all(one["document"] in asked for one, in CHAIN)
        assert said == "First the writer, then the place. Busan"


def test_each_document_is_shown_alone_and_all_of_them_once() -> None:
    item, = chains_of(*CHAIN).items(generator("multihop").settings)
    ask = ScriptedAsk(by_system(write_questions=f"<question>{QUESTION}</question>", answer_questions=solver),
                      "x", generator_class("multihop"))
    list(generator("multihop").make(item, ask))
    shown = [sum(f"\n{one['document']}\n" in str(request["messages"][1]["content"]) for one, in CHAIN)
             for request in ask.requests]
    assert shown == [0, 2, 1, 1, 0]


def test_problems_of_settings() -> None:
    cls = generator_class("multihop")
    assert keys_of(cls.Settings(form="x", min_hops=1, max_per_start=0, min_agreement=12, temperature=-1)) == [
        "min_hops", "max_per_start", "temperature", "form", "min_agreement"]
    assert keys_of(cls.Settings(min_hops=5)) == ["min_hops"]
