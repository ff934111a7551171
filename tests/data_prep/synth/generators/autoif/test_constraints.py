"""The generator `constraints`: of each planted fault one is caught, by the check that is meant for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from synthesis.actors import constraints as actor

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.autoif.constraints import Constraints, ConstraintsSettings, seeds_of
from data_prep.synth.known import generator_class
from megatron_sov.base.errors import UserError
from tests.data_prep.synth.scripted import ScriptedAsk, samples_of

GENERATOR = Constraints(ConstraintsSettings(call_time_s=0.5))
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
    (tmp_path / "b.jsonl").write_text('{"constraint": "End with a dot."}\n{"prompt": "Begin with a dot."}\n')
    assert seeds_of([tmp_path / "a.txt", tmp_path / "b.jsonl"], "ko") == [
        "Use no commas.", "Use two lines.", "End with a dot.", "Begin with a dot."]
    items = list(Constraints(ConstraintsSettings(rounds=2)).items([tmp_path / "a.txt"]))
    assert [item.id.partition(".")[0] for item in items] == ["seed", "seed", "round", "round"]


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "has no seed"), (b"Use {x}.\n", "has no seed"), (b"\xff\xfe", "cannot be read as UTF-8")])
def test_a_file_without_seeds_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        seeds_of([tmp_path / "seeds.txt"], "ko")


def test_all_problems_of_settings_are_told() -> None:
    assert problems_of(ConstraintsSettings()) == []
    assert keys_of(ConstraintsSettings(min_functions=6, min_cases=20, nli="/nowhere")) == [
        "min_functions", "min_cases", "nli"]
    assert keys_of(ConstraintsSettings(min_accuracy=0, call_time_s=100, min_agreement=11,
                                       rounds=-1, language="kr")) == [
        "language", "rounds", "min_accuracy", "call_time_s", "min_agreement"]
    assert generator_class("constraints") is Constraints
