"""Generator `constraints`: planted faults, and cross-validation against AutoIF's published rule."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from data_prep.synth.declared.generator import load_generator
from data_prep.synth.functions import constraints
from data_prep.synth.functions.constraints import (
    Case, CheckedFunctions, FunctionDraft, cross_check, find_wording_problem, parse_draft, parse_list_items)
from data_prep.synth.samples import GeneratorItem
from megatron_sov.judge.rewards.constraint import ConstraintVerdict
from tests.data_prep.synth.models import constraints as actor
from tests.data_prep.synth.scripted import ScriptedRequester, build_generator, collect_samples

CHECKS = {
    "": "", "accepts everything": "agreement", "rejects everything": "tells apart",
    "accepts all but blanks": "agreement", "never ends": "ends", "reads a file": "functions",
    "reaches the network": "functions", "gives no truth value": "agreement", "does not parse": "functions",
    "checks something else": "tells apart", "is described as the contrary": "judge: consistent",
    "has contrary cases": "agreement"}
"""Fault of a scripted model -> the check that rejects its constraint."""


@pytest.mark.parametrize("fault", CHECKS)
def test_each_fault_is_caught_by_its_check(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "CALL_TIME_S", 0.5)
    sample, = collect_samples(build_generator("constraints", per_call=1), actor.make_item(fault), actor.reply)
    assert sample.reason == CHECKS[fault]
    if not fault:
        # five functions with three cases each, by the generator's defaults
        record = json.loads(json.dumps(sample.record))
        assert len(record["functions"]) == 5 and len(record["cases"]) == 15 and len(record["back"]) == 5
        assert sample.notes["accuracies"] == [1.0] * 5


def test_a_call_invents_constraints_and_one_bad_answer_costs_one_of_them() -> None:
    good, without_functions = list(actor.RULES)[:2]

    def reply(request: Mapping[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        if "different instructions" in text:
            return f"Sure:\n- {good}\n2. {without_functions}\n* {good}\n- Repeat {{x}} twice.\n"
        if without_functions in text and "Write a function" in text:
            return ""
        return actor.reply(request)

    requester = ScriptedRequester(reply, "form.2", load_generator("constraints"))
    item = GeneratorItem("form.2", {"kind": "form", "seeds": "- a seed", "number": 2})
    samples = list(build_generator("constraints").make_samples(item, requester))
    assert [(sample.record["prompt"], sample.reason) for sample in samples] == [
        (good, ""), (without_functions, "functions"), ("Repeat {x} twice.", "wording")]
    # one request for constraints, then five for functions of the first constraint
    assert [request["temperature"] for request in requester.requests[:6]] == [0.7, *[0.2] * 5]
    assert "Write 50 different instructions" in requester.requests[0]["messages"][-1]["content"]


def test_the_packaged_kinds_have_thirty_seeds() -> None:
    generator = build_generator("constraints", rounds=1)
    seeds = [seed for item in generator.read_items([]) for seed in parse_list_items(item.fields["seeds"])]
    assert len(seeds) == len(set(seeds)) == 30 and not any(map(find_wording_problem, seeds))


EVERYTHING, NOTHING, HANGS = "accepts", "rejects", "hangs"


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace check functions by strings of the letters that they accept, or one of EVERYTHING, NOTHING and
    HANGS; return the list of the functions that were run."""
    run: list[str] = []

    def check(source: str, texts: Sequence[str]) -> list[ConstraintVerdict]:
        run.append(source)
        if source.startswith(HANGS):
            return [ConstraintVerdict(None, "did not end", ended=False) for _ in texts]
        if source in (EVERYTHING, NOTHING):
            return [ConstraintVerdict(source == EVERYTHING) for _ in texts]
        return [ConstraintVerdict(text in source) for text in texts]

    monkeypatch.setattr(constraints, "run_check", check)
    monkeypatch.setattr(constraints, "parse_draft", lambda draft: draft)
    return run


def check_drafts(drafts: Sequence[Any], ordinary: Sequence[str] = ("z",), **more: Any) -> CheckedFunctions:
    """Return the result of `cross_check` with loose limits, of which `more` replaces some."""
    return cross_check(drafts, ordinary, **{"min_functions": 1, "min_cases": 1, "min_kept_share": 0,
                                            "min_accuracy": 0.8, **more})


def select_by_autoif(drafts: Sequence[FunctionDraft], accuracy: float) -> set[str]:
    """Return the functions that step 3 of AutoIF's code keeps; it keeps a case if any function agrees."""
    cases = {(case.text, case.keeps) for draft in drafts for case in draft.cases}
    sources = {draft.source for draft in drafts}
    agreed = {(text, keeps) for text, keeps in cases if any((text in source) == keeps for source in sources)}
    return {source for source in sources if agreed and
            sum((text in source) == keeps for text, keeps in agreed) / len(agreed) >= accuracy}


def test_the_same_functions_stay_as_with_the_authors_code(letters: list[str]) -> None:
    """Draw five functions with three cases each, of which some are wrong."""
    rng = random.Random(0)
    sets = ["".join(some) for size in (1, 2, 3, 4) for some in itertools.combinations("abcd", size)]

    def draw_draft(truth: str) -> FunctionDraft:
        source = rng.choice([truth, truth, rng.choice(sets)])
        return FunctionDraft(source, tuple(Case(text, (text in truth) != (rng.random() < 0.15))
                                           for text in rng.choices("abcd", k=3)))

    num_with_functions = 0
    for _ in range(300):
        truth = rng.choice(sets)
        drafts = [draw_draft(truth) for _ in range(5)]
        # unlike AutoIF, our rule needs a case that a function accepts; no function accepts "z", the
        # ordinary text that it must reject
        expected = {source for source in select_by_autoif(drafts, 0.8) if any(
            case.keeps and case.text in source for draft in drafts for case in draft.cases)}
        assert set(check_drafts(drafts).functions) == expected
        num_with_functions += bool(expected)
    assert num_with_functions > 50


def test_functions_that_accept_or_reject_everything_are_refused(letters: list[str]) -> None:
    cases = (Case("a", True), Case("b", False), Case("c", False))
    assert check_drafts([FunctionDraft(EVERYTHING, cases)]).verdict.check == "tells apart"
    assert check_drafts([FunctionDraft(EVERYTHING, cases)], min_kept_share=0.5).verdict.check == "agreement"
    assert check_drafts([FunctionDraft(NOTHING, cases)]).verdict.check == "tells apart"
    not_blank = [FunctionDraft("abz", (Case("a", True), Case(" ", False)))]
    assert check_drafts(not_blank).verdict.check == "tells apart"
    assert check_drafts(not_blank, ["y"]).functions == ("abz",)


@pytest.mark.parametrize(("more", "check"), [
    ({"min_functions": 3}, "functions"), ({"min_cases": 9}, "cases"), ({"min_accuracy": 0.9}, "accuracy")])
def test_a_failed_check_is_named(more: dict[str, Any], check: str, letters: list[str]) -> None:
    disagreeing = [FunctionDraft("a", (Case("a", True), Case("b", True))),
                   FunctionDraft("b", (Case("c", False),)), "has no block of JSON"]
    result = check_drafts(disagreeing, **more)
    assert (result.verdict.check, result.verdict.passed) == (check, False)
    assert result.faults == ("has no block of JSON",)


def test_two_functions_that_do_not_end_reject_a_constraint(letters: list[str]) -> None:
    """Further functions are not run, since each would take the whole time limit."""
    result = check_drafts([FunctionDraft(f"{HANGS} {i}", (Case("a", True),)) for i in range(5)])
    assert (result.verdict.check, letters) == ("ends", [f"{HANGS} 0", f"{HANGS} 1"])


SOURCE = "def evaluate(response):\n    return True"


def format_reply(cases: object, source: str = SOURCE) -> str:
    return f"Here:\n```python\n{source}\n```\nand\n```json\n{json.dumps(cases)}\n```"


def test_a_reply_is_a_block_of_python_and_one_of_json() -> None:
    cases = [{"input": "a", "output": True}, {"input": "b", "output": " False"},
             {"input": "c", "output": "maybe"}, {"input": 3, "output": True}, {"output": True}, "x",
             {"input": "d", "output": 1}]
    assert parse_draft(format_reply(cases)) == FunctionDraft(SOURCE, (Case("a", True), Case("b", False)))


@pytest.mark.parametrize(("reply", "fault"), [
    (format_reply({"input": "a"}), "has no block of JSON"), ("I cannot do that.", "is no Python"),
    (f"```python\n{SOURCE}\n```", "has no block of JSON"), ("", "has no function"),
    (format_reply([], "import os\n" + SOURCE), "imports os"),
    (format_reply([]).replace("[]", "[" * 100_000), "has no block of JSON")])
def test_a_reply_of_another_form_is_described(reply: str, fault: str) -> None:
    assert fault in str(parse_draft(reply))


@pytest.mark.parametrize(("text", "fault"), [
    ("Use no commas.", ""), (" ", "is empty"), ("x" * 301, "has 301 characters"), ("a\nb", "several lines"),
    ("Use {x} twice.", "has the placeholder {x}")])
def test_a_constraint_is_a_line_without_placeholders(text: str, fault: str) -> None:
    assert fault in find_wording_problem(text) and bool(find_wording_problem(text)) is bool(fault)
