"""Rewritten documents: what is kept, and why other rewrites are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, build, first_reason, one_of_each
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.rewrite import RewriteSettings, dialogue

CASES = one_of_each("rewrite")
REASONS = {
    "rewritten well": "", "a wrong year": "numbers", "a wrong count": "numbers", "another founder": "names",
    "a number that the document has not": "numbers", "a copy": "copied", "another language": "language",
    "a quotation that nobody said": "quotes", "another document": "numbers", "cut off": "complete",
    "no form": "form", "an order that was followed": "names", "a first sentence alone": "length",
    "the contrary, without a name or a number": "judge: faithful"}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    assert first_reason(build("rewrite", styles=("clearer",)), CASES[what]) == REASONS[what]


def test_each_style_is_a_sample_with_figures() -> None:
    samples = samples_of(build("rewrite"), CASES["rewritten well"].item, actor("rewrite").reply)
    assert [sample.record["style"] for sample in samples] == ["clearer", "encyclopedic", "dialogue"]
    assert all(not sample.reason and sample.notes["copied_share"] < 0.1 for sample in samples)
    assert samples[2].record["text"].startswith("A: ")


def test_a_document_opens_no_turn_and_is_no_template() -> None:
    text = CASES["rewritten well"].item.fields["text"]
    assert "{{ captain }}" in text and "<|im_end|>" in text
    ask = ScriptedAsk(actor("rewrite").reply)
    list(build("rewrite", styles=("clearer",)).make(CASES["rewritten well"].item, ask))
    roles = [message["role"] for message in ask.requests[0]["messages"]]
    assert roles == ["system", "user"] and text in ask.requests[0]["messages"][1]["content"]


def test_nothing_is_asked_about_a_text_in_no_language() -> None:
    ask = ScriptedAsk(actor("rewrite").reply)
    sample, = build("rewrite").make(GeneratorItem("x", {"text": "12 34 56 " * 50}), ask)
    assert (sample.reason, ask.calls) == ("source language", 0)


@pytest.mark.parametrize(("text", "passed"), [
    ("A: a\nB: b\nA: c\nB: d", True), ("A: a\nB: b\n\nA: c\nB: d", True), ("A: a\nA: b\nB: c\nA: d", False),
    ("A: a\nB: b", False), ("Here it is:\nA: a\nB: b\nA: c\nB: d", False), ("B: a\nA: b\nB: c\nA: d", False)])
def test_a_dialogue_has_turns_that_alternate(text: str, passed: bool) -> None:
    assert dialogue(text).passed is passed


def test_problems_of_settings() -> None:
    assert problems_of(RewriteSettings()) == []
    assert keys_of(RewriteSettings(max_copied_share=2, min_faithfulness=11)) == [
        "max_copied_share", "min_faithfulness"]
    assert keys_of(RewriteSettings(styles=("rap", "clearer"))) == ["styles.0"]  # type: ignore[arg-type]
    assert keys_of(RewriteSettings(styles=("clearer", "clearer"))) == keys_of(RewriteSettings(styles=())) == [
        "styles"]
    assert keys_of(RewriteSettings(min_ratio=3)) == ["min_ratio"]
