"""The generator `constraints`: each planted fault is caught by the check that is meant for it.

Cross-validation is AutoIF's rule as its authors wrote it, with the hole in it closed.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.generators.autoif.constraints import Case, Crossed, CrossingDraft, crossed, read_draft
from megatron_sov.base.settings import problems_of
from megatron_sov.judge.rewards.constraint import ConstraintVerdict
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.autoif.constraints import Constraints, ConstraintsSettings, seeds_of
from data_prep.synth.known import generator_class
from megatron_sov.base.errors import UserError
from tests.data_prep.synth.models import constraints as actor
from tests.data_prep.synth.scripted import ScriptedAsk, samples_of

GENERATOR = Constraints(ConstraintsSettings())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.synth.generators.autoif.constraints.CALL_TIME_S", 0.5)


CASES = {case.what: case for case in reversed(actor.cases())}
REASONS = {
    "a sound constraint": "", "accepts everything": "agreement", "rejects everything": "tells apart",
    "accepts all but blanks": "agreement", "never ends": "ends", "reads a file": "functions",
    "reaches the network": "functions", "gives no truth value": "agreement", "does not parse": "functions",
    "checks something else": "tells apart", "told back as the contrary": "judge: consistent",
    "told back by too few": "told back", "cases that say the contrary": "agreement"}


@pytest.mark.parametrize("what", CASES)
def test_each_fault_is_caught_by_its_check(what: str) -> None:
    sample, = samples_of(GENERATOR, CASES[what].item, CASES[what].replies)
    assert sample.reason == REASONS[what]
    if CASES[what].good:
        record = json.loads(json.dumps(sample.record))
        assert len(record["functions"]) == 5 and len(record["cases"]) == 15 and len(record["back"]) == 5
        assert sample.notes["accuracies"] == [1.0] * 5


def test_a_round_invents_constraints_and_one_bad_answer_costs_one_of_them() -> None:
    three = list(actor.RULES)[:3]

    def reply(request: Mapping[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        if "different instructions" in text:
            return (f"Sure:\n- {three[0]}\n2. {three[1]}\n* {three[2]}\n- {three[0]}\n- Repeat {{x}} twice.\n"
                    "- a seed\n")
        return "" if three[1] in text and "Write a function" in text else actor.reply(request)
    samples = samples_of(GENERATOR, GeneratorItem("round.0", {"seeds": ["A  Seed", "b"]}), reply)
    assert [(sample.record["prompt"], sample.reason) for sample in samples] == [
        (three[0], ""), (three[1], "functions"), (three[2], ""), ("Repeat {x} twice.", "wording")]


def test_asked_as_the_paper_says() -> None:
    ask = ScriptedAsk(actor.reply, "round.0", Constraints)
    next(iter(GENERATOR.make(GeneratorItem("round.0", {"seeds": [next(iter(actor.RULES))]}), ask)))
    temperatures = [request["temperature"] for request in ask.requests[:7]]
    assert temperatures == [0.7, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert "Write 50 different instructions" in ask.requests[0]["messages"][-1]["content"]
    assert len({request["seed"] for request in ask.requests[1:6]}) == 5


def test_seeds_are_thirty_of_ours_or_those_of_a_file(tmp_path: Path) -> None:
    for language in ("ko", "en", "th", "ja"):
        assert len(seeds_of([], language)) == 30
    (tmp_path / "a.txt").write_text("Use no commas.\n\n  Use two lines.  \nUse {x}.\nUse no commas.\n")
    assert seeds_of([tmp_path / "a.txt"], "ko") == ["Use no commas.", "Use two lines."]
    items = list(Constraints(ConstraintsSettings(rounds=2)).items([tmp_path / "a.txt"]))
    assert [item.id.partition(".")[0] for item in items] == ["seed", "seed", "round", "round"]


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "has no seed"), (b"Use {x}.\n", "has no seed"), (b"\xff\xfe", "seeds.txt")])
def test_a_file_without_seeds_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        seeds_of([tmp_path / "seeds.txt"], "ko")


def test_all_problems_of_settings_are_told() -> None:
    assert problems_of(ConstraintsSettings()) == []
    assert keys_of(ConstraintsSettings(min_functions=6, min_cases=20)) == [
        "min_functions", "min_cases"]
    assert keys_of(ConstraintsSettings(min_accuracy=0, min_agreement=11, rounds=-1, language="kr")) == [
        "language", "rounds", "min_accuracy", "min_agreement"]
    assert generator_class("constraints") is Constraints


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


def write(cases: object, source: str = SOURCE) -> str:
    return f"Here:\n```python\n{source}\n```\nand\n```json\n{json.dumps(cases)}\n```"


def test_an_answer_is_a_block_of_python_and_one_of_json() -> None:
    cases = [{"input": "a", "output": True}, {"input": "b", "output": " False"},
             {"input": "c", "output": "maybe"}, {"input": 3, "output": True}, {"output": True}, "x",
             {"input": "d", "output": 1}]
    assert read_draft(write(cases)) == CrossingDraft(SOURCE, (Case("a", True), Case("b", False)))
    assert read_draft(write([])) == CrossingDraft(SOURCE, ())


@pytest.mark.parametrize(("answer", "fault"), [
    (write({"input": "a"}), "has no block of JSON"), (f"```python\n{SOURCE}\n```", "has no block of JSON"),
    (write([], "import os\n" + SOURCE), "imports os"), ("I cannot do that.", "is no Python"),
    ("", "has no function"),
    (write([]).replace("[]", "[" * 100_000), "has no block of JSON"),
])
def test_what_is_no_such_answer_is_told(answer: str, fault: str) -> None:
    assert fault in str(read_draft(answer))
