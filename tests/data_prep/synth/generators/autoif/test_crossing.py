"""Cross-validation: AutoIF's rule as its authors wrote it, and the hole in it closed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence

import pytest

from data_prep.synth.generators.autoif.crossing import Case, Crossed, CrossingDraft, crossed, read_draft
from megatron_sov.judge.rewards.constraint import ConstraintVerdict

EVERYTHING, NOTHING = "accepts", "rejects"


def judging(source: str, texts: Sequence[str]) -> list[ConstraintVerdict]:
    """Functions of this test: the letters that they accept, or two words."""
    if source == "hangs":
        return [ConstraintVerdict(None, "did not end", ended=False) for _ in texts]
    if source in (EVERYTHING, NOTHING):
        return [ConstraintVerdict(source == EVERYTHING) for _ in texts]
    return [ConstraintVerdict(text in source) for text in texts]


def left(drafts: Sequence[CrossingDraft], others: Sequence[str] = (), *, kept: float = 0.0,
         accuracy: float = 0.8, functions: int = 1, cases: int = 1) -> Crossed:
    return crossed(drafts, others, judging, min_functions=functions, min_cases=cases, min_kept_share=kept,
                   min_accuracy=accuracy)


def authors(drafts: Sequence[CrossingDraft], accuracy: float) -> set[str]:
    """The functions that AutoIF's released step 3 keeps (a case stays if one function agrees)."""
    cases = {(case.text, case.keeps) for draft in drafts for case in draft.cases}
    sources = {draft.source for draft in drafts}
    kept = {(text, keeps) for text, keeps in cases if any((text in source) == keeps for source in sources)}
    return {source for source in sources if kept and
            sum((text in source) == keeps for text, keeps in kept) / len(kept) >= accuracy}


def test_the_same_functions_stay_as_with_the_authors_code() -> None:
    rng = random.Random(0)
    sets = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.combinations("abcd", size)]
    compared = 0
    for _ in range(300):
        truth = rng.choice(sets)
        drafts = [CrossingDraft(rng.choice([truth, truth, rng.choice(sets)]), tuple(
            Case(text, (text in truth) != (rng.random() < 0.15)) for text in rng.choices("abcd", k=3)))
            for _ in range(5)]
        found = left(drafts, others=["z"])  # no letter of theirs: each rejects an ordinary text
        wanted = authors(drafts, 0.8)
        telling = {source for source in wanted if any(
            case.keeps and case.text in source for draft in drafts for case in draft.cases)}
        assert set(found.functions) == telling
        compared += bool(telling)
    assert compared > 50


def test_functions_that_accept_everything_are_refused_where_autoif_keeps_them() -> None:
    cases = (Case("a", True), Case("b", False), Case("c", False))
    drafts = [CrossingDraft(EVERYTHING, cases)]
    assert left(drafts, others=["z"]).check == "tells apart"
    assert left(drafts, others=["z"], kept=0.5).check == "agreement"
    assert left([CrossingDraft(NOTHING, cases)], others=["z"]).check == "tells apart"


def test_a_function_that_rejects_blanks_alone_tells_nothing() -> None:
    not_blank = "abz"
    drafts = [CrossingDraft(not_blank, (Case("a", True), Case(" ", False)))]
    assert left(drafts, others=["z"]).check == "tells apart"
    assert left(drafts, others=["y"]).functions == (not_blank,)


@pytest.mark.parametrize(("more", "check"), [
    ({"functions": 3}, "functions"), ({"cases": 9}, "cases"), ({}, "accuracy")])
def test_what_is_missing_is_named(more: dict[str, int], check: str) -> None:
    disagreeing = [CrossingDraft("a", (Case("a", True), Case("b", True))),
                   CrossingDraft("b", (Case("c", False),))]
    assert left(disagreeing, accuracy=0.9, **more).check == check


def test_functions_that_do_not_end_are_few() -> None:
    asked: list[str] = []

    def slow(source: str, texts: Sequence[str]) -> list[ConstraintVerdict]:
        asked.append(source)
        return judging("hangs", texts)
    found = crossed([CrossingDraft(f"f{i}", (Case("a", True),)) for i in range(5)], [], slow, min_functions=1,
                    min_cases=1, min_kept_share=0, min_accuracy=0.8)
    assert (found.check, asked) == ("ends", ["f0", "f1"])


SOURCE = "def evaluate(response):\n    return True"


def told(cases: object, source: str = SOURCE) -> str:
    return f"Here:\n```python\n{source}\n```\nand\n```json\n{json.dumps(cases)}\n```"


def test_an_answer_is_a_block_of_python_and_one_of_json() -> None:
    cases = [{"input": "a", "output": True}, {"input": "b", "output": " False"},
             {"input": "c", "output": "maybe"}, {"input": 3, "output": True}, {"output": True}, "x",
             {"input": "d", "output": 1}]
    assert read_draft(told(cases)) == CrossingDraft(SOURCE, (Case("a", True), Case("b", False)))
    assert read_draft(told([])) == CrossingDraft(SOURCE, ())


@pytest.mark.parametrize(("answer", "fault"), [
    (told({"input": "a"}), "has no block of JSON"), (f"```python\n{SOURCE}\n```", "has no block of JSON"),
    (told([], "import os\n" + SOURCE), "imports os"), ("I cannot do that.", "is no Python"),
    ("", "has no function"),
    (told([]).replace("[]", "[" * 100_000), "has no block of JSON"),
])
def test_what_is_no_such_answer_is_told(answer: str, fault: str) -> None:
    assert fault in str(read_draft(answer))
