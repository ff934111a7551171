"""Facts of documents: what is kept, and why other facts are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, build, one_of_each
from scripted import samples_of

CASES = one_of_each("triples")
REASONS = {
    "sound facts": [""], "facts of another document": ["sentence in document"] * 2,
    "a sentence that the document has not": ["sentence in document"] * 2,
    "an object that the sentence has not": ["names in sentence"] * 2, "a pronoun": ["names"] * 2,
    "a clause": ["names"] * 2, "subject and object are one": ["names"] * 2,
    "another relation": ["judge: stated"] * 2,
    "subject and object in each other's place": ["judge: stated"] * 2,
    "no form": ["form"], "cut off": ["complete"], "an order that was followed": ["form"]}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    samples = samples_of(build("triples"), CASES[what].item, CASES[what].replies)
    reasons = [sample.reason for sample in samples]
    assert [reason for reason in reasons if reason != "number of facts"] == REASONS[what]


def test_a_document_is_kept_with_its_facts() -> None:
    item = CASES["sound facts"].item
    sample, = samples_of(build("triples"), item, actor("triples").reply)
    assert sample.record["document"] == item.fields["text"]
    parts = ["object", "relation", "sentence", "subject"]
    assert [sorted(triple) for triple in sample.record["triples"]] == [parts, parts]


def test_the_same_fact_counts_once() -> None:
    def twice(request: object) -> str:
        return actor("triples").reply(request) * (2 if "List up to" in str(request) else 1)

    samples = samples_of(build("triples"), CASES["sound facts"].item, twice)
    assert [sample.reason for sample in samples] == ["another fact", "another fact", ""]
