"""Generator `translation`: accepted translations, and the check that rejects each fault."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.declared.generator import load_generator
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.records import parse_record
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.synth.planted_rates import write
from tests.data_prep.synth.scripted import ScriptedRequester, build_generator, build_model, collect_samples

SOURCE = ("The tide gauge at the old harbour was built in 1911. Two keepers note the height of the water "
          "every morning before the first ferry leaves. See `tides --show 4` and tell {visitor} of it.")
KOREAN = ("옛 항구의 조위계는 1911년에 세워졌다. 두 명의 지기가 첫 배가 떠나기 전 아침마다 물의 높이를 "
          "적는다. `tides --show 4`를 보고 {visitor}에게 알려 주시오.")
BACK = SOURCE.replace("keepers note", "wardens write down").replace("leaves", "departs")


@pytest.mark.parametrize(("reply", "back", "grade", "reason"), [
    (KOREAN, BACK, 9, ""), (KOREAN.replace("1911", "1912"), BACK, 9, "numbers"),
    (KOREAN.replace("{visitor}", "방문자"), BACK, 9, "code and placeholders"),
    (KOREAN.replace("--show", "--보기"), BACK, 9, "code and placeholders"), (SOURCE, BACK, 9, "language"),
    (KOREAN, "Something else, with 1911 and `tides --show 4` and {visitor}.", 9, "back translation"),
    (KOREAN, BACK, 2, "judge: translated"), (KOREAN * 9, BACK, 9, "code and placeholders"),
    ({"content": f"<translation>{KOREAN}", "finish_reason": "length"}, BACK, 9, "complete"),
    ({"content": KOREAN}, BACK, 9, "form")])
def test_each_planted_fault_is_rejected_by_its_check(reply: Any, back: str, grade: float,
                                                     reason: str) -> None:
    text = reply if isinstance(reply, dict) else f"<translation>{reply}</translation>"
    model = build_model(You_translate_exactly=f"<translation>{back}</translation>", You_translate=text,
                        grade=grade)
    generator = build_generator("translation", language="ko")
    sample, = collect_samples(generator, GeneratorItem("x", {"text": SOURCE}), model)
    assert sample.reason == reason


def translate_by_dictionary(request: Any) -> str:
    """Reply as a model that translates the two sentences of CHAT to Korean and back, and grades with 9."""
    to_korean = {"What is a token?": "토큰이란 무엇인가?", "A piece of a text.": "글의 한 조각이다."}
    if "You grade a response" in request["messages"][0]["content"]:
        return '{"score": 9}'
    text = request["messages"][1]["content"].split("===\n")[1].split("\n===")[0]
    to_english = {korean: english for english, korean in to_korean.items()}
    return f"<translation>{(to_korean | to_english)[text]}</translation>"


TO_KOREAN: dict[str, Any] = {"language": "ko", "keep_quotes": True, "source_language": "en"}
CHAT = [{"role": "user", "content": "What is a token?"},
        {"role": "assistant", "content": "A piece of a text."}]


def translate(form: str, folder: Path, record: dict[str, Any]) -> Any:
    """Return the accepted translation of a record."""
    generator = build_generator("translation", form=form, **TO_KOREAN)
    item, = generator.read_items([write(folder / "input.jsonl", [record])])
    sample, = collect_samples(generator, item, translate_by_dictionary)
    assert (sample.reason, generator.kind) == ("", form)
    return sample


def test_chats_keep_their_roles(tmp_path: Path) -> None:
    sample = translate("chat", tmp_path, {"messages": CHAT})
    assert sample.record["messages"] == [{"role": "user", "content": "토큰이란 무엇인가?"},
                                         {"role": "assistant", "content": "글의 한 조각이다."}]
    assert parse_record(dict(sample.record), "x", 1, RecordReading(kind="chat")).kind == "chat"


def test_prompts_keep_the_fields_of_their_reward(tmp_path: Path) -> None:
    sample = translate("prompt", tmp_path, {"prompt": "What is a token?", "answer": "12"})
    assert sample.record["answer"] == "12"
    assert sample.record["prompt"] == [{"role": "user", "content": "토큰이란 무엇인가?"}]


def test_chats_with_tools_are_not_translated(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    generator = build_generator("translation", form="chat", **TO_KOREAN)
    item, = generator.read_items([write(tmp_path / "input.jsonl", [{"messages": CHAT, "tools": tools}])])
    ask = ScriptedRequester(translate_by_dictionary)
    sample, = generator.make_samples(item, ask)
    assert (sample.reason, ask.calls) == ("plain messages", 0)


def test_text_in_the_target_language_is_rejected_without_a_request() -> None:
    ask = ScriptedRequester(translate_by_dictionary)
    generator = build_generator("translation", language="en")
    sample, = generator.make_samples(GeneratorItem("x", {"text": SOURCE}), ask)
    assert (sample.reason, ask.calls) == ("source language", 0)


def test_problems_of_settings(tmp_path: Path) -> None:
    settings = load_generator("translation").Settings
    assert find_all_problems(settings(language="ko")) == []
    with pytest.raises(UserError, match="name the language"):
        list(build_generator("translation").read_items([write(tmp_path / "input.jsonl", [{"text": SOURCE}])]))


@pytest.mark.parametrize(("source", "translation", "keep_quotes", "reason"), [
    ("What does “break a leg” mean?", "“break a leg”은 무슨 뜻인가?", True, ""),
    ("What does “break a leg” mean?", "“다리를 부러뜨려라”는 무슨 뜻인가?", True, "quotes"),
    ("What does “break a leg” mean?", "“다리를 부러뜨려라”는 무슨 뜻인가?", False, ""),
    ("This is a text that nobody translated.", "This is a text that nobody translated.", False, "language"),
    ("The house is old. Nobody lives in it, and the roof has long since fallen down.",
     "집이 낡았고 오래전부터 아무도 그곳에 살지 않으며 지붕도 무너졌다. "
     "and the roof has long since fallen down", False, "untranslated")])
def test_lost_quotations_and_untranslated_parts_are_rejected(source: str, translation: str,
                                                             keep_quotes: bool, reason: str) -> None:
    model = build_model(You_translate_exactly=f"<translation>{source}</translation>",
                        You_translate=f"<translation>{translation}</translation>", grade=9)
    generator = build_generator("translation", language="ko", source_language="en", keep_quotes=keep_quotes)
    sample, = collect_samples(generator, GeneratorItem("x", {"text": source}), model)
    assert sample.reason == reason
