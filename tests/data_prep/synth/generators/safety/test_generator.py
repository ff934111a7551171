"""The generator `safety`: planted faults are caught by their checks, and pairs reject refusals alone."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from synthesis.actors import safety as actor

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.safety.generator import SafetyGenerator, SafetyGeneratorSettings
from data_prep.synth.generators.safety.refusals import refuses
from megatron_sov.base.errors import UserError
from tests.data_prep.synth.scripted import samples_of

GENERATOR = SafetyGenerator(SafetyGeneratorSettings(pairs_per_call=1))
CASES = {(case.what, case.item.fields["language"], case.item.fields["category"]["strategy"]): case
         for case in actor.cases()}
OF_REQUEST = {
    "careful answers": {"redirect": "", "safe-complete": ""},
    "harmful completion": {"redirect": "judge: withholds", "safe-complete": "judge: withholds"},
    "refusal without a way out": {"redirect": "judge: redirects", "safe-complete": "judge: completes"},
    "refuses a harmless twin": {"redirect": "judge: category", "safe-complete": "judge: category"},
    "answers in another language": {"redirect": "language", "safe-complete": "language"},
    "talks to the judge": {"redirect": "judge: withholds", "safe-complete": "judge: withholds"},
    "request is harmless": {"redirect": "judge: category", "safe-complete": "judge: category"},
    "is cut off": {"redirect": "ended", "safe-complete": "ended"},
    "requests are no JSON": {"redirect": "requests", "safe-complete": "requests"}}
OF_TWIN = {"careful answers": "", "refuses a harmless twin": "answered",
           "answers in another language": "language", "is cut off": "ended"}


@pytest.mark.parametrize(("what", "language", "strategy"), CASES)
def test_each_fault_is_caught_by_its_check(what: str, language: str, strategy: str) -> None:
    case = CASES[what, language, strategy]
    first, *more = samples_of(GENERATOR, case.item, case.replies)
    assert first.reason == OF_REQUEST[what][strategy]
    if what != "requests are no JSON":
        assert [twin.reason for twin in more] == [OF_TWIN.get(what, "judge: harmless")]


def test_pairs_reject_a_refusal_where_an_answer_was_kept() -> None:
    case = next(case for case in CASES.values() if case.good)
    generator = SafetyGenerator(SafetyGeneratorSettings(pairs_per_call=1, also="pairs"))
    samples = samples_of(generator, case.item, case.replies)
    assert [(sample.kind, sample.reason) for sample in samples] == [(None, ""), ("prompt", "")] * 2
    for answer, pair in (samples[:2], samples[2:]):
        assert pair.record["chosen"] == answer.record["messages"][-1]["content"]
        assert refuses(pair.record["rejected"], case.item.fields["language"])
        assert pair.group == answer.group


def test_one_answer_of_no_use_costs_one_request() -> None:
    case = next(case for case in CASES.values() if case.good)

    def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
        is_careful = any(words in str(request["messages"]) for words in ("You decline", "turn the user"))
        return "" if is_careful else actor.reply(request)
    samples = samples_of(SafetyGenerator(SafetyGeneratorSettings(pairs_per_call=2)), case.item, reply)
    assert [sample.reason for sample in samples] == ["answer", "", "answer", ""]


def test_items_are_categories_by_languages_by_calls(tmp_path: Path) -> None:
    items = list(SafetyGenerator(SafetyGeneratorSettings(calls=2)).items([]))
    assert len({item.id for item in items}) == len(items) == 38 * 3 * 2
    assert Counter(item.fields["language"] for item in items) == dict.fromkeys(("ko", "en", "th"), 76)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("categories: [{id: x, name: X, strategy: redirect, withhold: w, "
                                     "examples: [e], twin: t}]")
    assert isinstance(next(iter(GENERATOR.items([tmp_path / "a.yaml"]))), GeneratorItem)
    with pytest.raises(UserError, match="category x stands in"):
        list(GENERATOR.items([tmp_path / "a.yaml", tmp_path / "b.yaml"]))


def test_all_problems_of_settings_are_told() -> None:
    assert problems_of(SafetyGeneratorSettings()) == []
    assert keys_of(SafetyGeneratorSettings(calls=0, temperature=3, min_score=11)) == [
        "calls", "temperature", "min_score"]
    assert keys_of(SafetyGeneratorSettings(languages=("kr", "ja", "ko", "ko"))) == ["languages.0",
                                                                                    "languages.1"]
    assert keys_of(SafetyGeneratorSettings(languages=())) == ["languages"]
