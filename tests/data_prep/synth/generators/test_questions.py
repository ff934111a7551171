"""Questions of documents: what is kept, and why other pairs are not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, build, one_of_each
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generators.questions import QuestionSettings
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.records import parse_record
from megatron_sov.judge.rewards.answers import Stem

CASES = one_of_each("questions")
REASONS = {
    "sound pairs": set(), "answers of another document": {"numbers", "judge: supported"},
    "questions of another document": {"numbers", "names", "judge: supported"},
    "right words, to another question": {"answer not in question", "judge: answered with document"},
    "numbers that the document has not": {"numbers"}, "answers in the questions": {"answer not in question"},
    "questions about a text": {"question stands alone"}, "the same question again": {"another question"},
    "another language": {"language"}, "two pairs alone": set(), "an order that was followed": {"form"},
    "questions that the document does not answer": {"answered with document"},
    "cut off": {"complete"}, "no form": {"form"}}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    samples = samples_of(build("questions"), CASES[what].item, CASES[what].replies)
    reasons = {sample.reason for sample in samples} - {""}
    assert reasons - {"number of pairs"} <= REASONS[what]
    assert bool(reasons) is not CASES[what].good


def test_a_document_stands_before_its_pairs() -> None:
    item = CASES["sound pairs"].item
    sample, = samples_of(build("questions"), item, actor("questions").reply)
    assert sample.record["text"].startswith(item.fields["text"])
    assert sample.record["text"].count("\n\nQ: ") == 6


@pytest.mark.parametrize("form", ["chat", "prompt"])
def test_pairs_as_chats_and_prompts(form: Any) -> None:
    samples = samples_of(build("questions", form=form), CASES["sound pairs"].item, actor("questions").reply)
    assert len(samples) == 6 and build("questions", form=form).kind == form
    for sample in samples:
        document = parse_record(dict(sample.record), "x", 1, RecordReading(kind=form))
        assert document.kind == form
        assert sample.notes == {"known_without": False}
        if form == "prompt":
            row = {**sample.record, "response": f"The answer is {sample.record['answer']}"}
            assert Stem().score(row).reward == 1


def test_what_is_known_without_the_document_is_noted_or_refused() -> None:
    questions = actor("questions")

    def knows_all(request: Any) -> Any:
        said = questions.reply(request)
        if said == "<answer>unknown</answer>":
            return questions.reply({"messages": [request["messages"][0], {
                "role": "user", "content": f"{pairs_asked.requests[0]['messages'][1]['content']}\n"
                                           f"{request['messages'][1]['content']}"}]})
        return said

    item = CASES["sound pairs"].item
    for refuse_known, reason in ((False, ""), (True, "needs the document")):
        pairs_asked = ScriptedAsk(knows_all)
        generator = build("questions", form="chat", refuse_known=refuse_known)
        samples = list(generator.make(item, pairs_asked))
        assert {sample.reason for sample in samples} == {reason}
        assert all(sample.notes["known_without"] for sample in samples)


def test_problems_of_settings() -> None:
    assert problems_of(QuestionSettings()) == []
    bad = QuestionSettings(form="song", max_likeness=2)  # type: ignore[arg-type]
    assert keys_of(bad) == ["form", "max_likeness"]
    assert keys_of(QuestionSettings(min_pairs=9, ask_without=False, refuse_known=True)) == [
        "min_pairs", "refuse_known"]
