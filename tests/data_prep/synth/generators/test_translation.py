"""Translations: what is kept, and why others are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sacrebleu import sentence_chrf

from megatron_sov.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, first_reason, made, one_of_each
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generators.translation import TranslationSettings, chrf
from megatron_sov.documents import Reading
from megatron_sov.documents.records import parse_record
from megatron_sov.errors import UserError

CASES = one_of_each("translation")
REASONS = {
    "translated well": "", "a wrong number": "numbers", "a number too many": "numbers", "cut off": "complete",
    "the numbers, in another text": "back translation", "a translated quotation": "quotes", "no form": "form",
    "one paragraph not translated": "language", "not translated": "language",
    "the contrary, in one word": "judge: translated"}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    assert first_reason(made("translation"), CASES[what]) == REASONS.get(what, "code and placeholders")


def write(folder: Path, *records: dict[str, Any]) -> Path:
    """Write records."""
    file = folder / "input.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def dictionary(request: Any) -> str:
    """Translate what the test says, forth and back."""
    words = {"What is a token?": "토큰이란 무엇인가?", "A piece of a text.": "글의 한 조각이다."}
    if "You grade a response" in request["messages"][0]["content"]:
        return '{"score": 9}'
    text = request["messages"][1]["content"].split("===\n")[1].split("\n===")[0]
    back = {korean: english for english, korean in words.items()}
    return f"<translation>{(words | back)[text]}</translation>"


CHAT = [{"role": "user", "content": "What is a token?"},
        {"role": "assistant", "content": "A piece of a text."}]


def test_chats_keep_their_roles(tmp_path: Path) -> None:
    generator = made("translation", form="chat", source_language="en")
    item, = generator.items([write(tmp_path, {"messages": CHAT})])
    sample, = samples_of(generator, item, dictionary)
    assert sample.reason == ""
    assert sample.record["messages"] == [{"role": "user", "content": "토큰이란 무엇인가?"},
                                         {"role": "assistant", "content": "글의 한 조각이다."}]
    assert parse_record(dict(sample.record), "x", 1, Reading(kind="chat")).kind == "chat"


def test_prompts_keep_what_their_reward_needs(tmp_path: Path) -> None:
    generator = made("translation", form="prompt", source_language="en")
    item, = generator.items([write(tmp_path, {"prompt": "What is a token?", "answer": "12"})])
    sample, = samples_of(generator, item, dictionary)
    assert sample.reason == "" and sample.record["answer"] == "12" and generator.kind == "prompt"
    assert sample.record["prompt"] == [{"role": "user", "content": "토큰이란 무엇인가?"}]


def test_chats_with_tools_are_not_translated(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    generator = made("translation", form="chat", source_language="en")
    item, = generator.items([write(tmp_path, {"messages": CHAT, "tools": tools})])
    ask = ScriptedAsk(dictionary)
    sample, = generator.make(item, ask)
    assert (sample.reason, ask.calls) == ("plain messages", 0)


def test_what_is_in_the_language_already_costs_nothing() -> None:
    ask = ScriptedAsk(actor("translation").reply)
    sample, = made("translation", language="en").make(CASES["translated well"].item, ask)
    assert (sample.reason, ask.calls) == ("source language", 0)


def test_a_glossary_is_told_and_checked(tmp_path: Path) -> None:
    glossary = tmp_path / "terms.tsv"
    glossary.write_text("token\t형태소\nnever met\t없음\n", encoding="utf-8")
    generator = made("translation", form="prompt", source_language="en", glossary=str(glossary))
    item, = generator.items([write(tmp_path, {"prompt": "What is a token?"})])
    ask = ScriptedAsk(dictionary)
    sample, = generator.make(item, ask)
    assert "token -> 형태소" in ask.requests[0]["messages"][1]["content"]
    assert "never met" not in str(ask.requests) and sample.reason == "glossary"
    assert generator.files() == [glossary]


def test_chrf_is_sacrebleus() -> None:
    one, other = "이 도시는 강을 끼고 있다.", "이 도시는 강가에 있다."
    assert chrf(one, other) == sentence_chrf(one, [other]).score
    assert (chrf(one, one), chrf("", one)) == (pytest.approx(100), 0)


def test_problems_of_settings() -> None:
    assert problems_of(TranslationSettings(language="ko")) == []
    assert "name the language" in str(problems_of(TranslationSettings())[0])
    bad = TranslationSettings(language="ko", form="song", min_chrf=101)  # type: ignore[arg-type]
    assert keys_of(bad) == ["form", "min_chrf"]
    assert keys_of(TranslationSettings(language="ko", source_language="ko", min_ratio=5)) == [
        "source_language", "min_ratio"]
    with pytest.raises(UserError, match="cannot be read"):
        made("translation", glossary="nowhere.tsv")
