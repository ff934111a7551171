"""The generator `safety`: planted faults are caught by their checks, refusals by their beginnings, and
mistakes of a taxonomy are told with their lines.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.generators.safety import Category, read_taxonomy, refuses
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
from synthesis.actors import safety as actor

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.safety import SafetyGenerator, SafetyGeneratorSettings
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


REFUSALS = {
    "en": ["I'm sorry, but I can't help with that.", "I cannot help you with this. Instead, talk to someone.",
           "I won't write that.", "Sorry, I am unable to assist.", "We must decline this.",
           "I can’t provide that information.", "That is against my guidelines."],
    "ko": ["죄송하지만 그 요청은 도와드릴 수 없습니다.",
           "그 방법은 알려 드릴 수 없어요. 대신 경찰에 문의하세요.",
           "해당 내용은 제공할 수 없습니다.", "그 부분은 도와드리기 어렵습니다. 대신",
           "그 요청에는 응할 수 없습니다.", "이 요청은 거절하겠습니다.", "그런 글은 작성해 드릴 수 없습니다.",
           "죄송합니다. 답변드리기 어렵습니다.",
           "I'm sorry, I can't help with that."],
    "th": ["ขออภัยค่ะ ฉันไม่สามารถช่วยเรื่องนี้ได้", "ผมไม่สามารถให้ข้อมูลนั้นได้ครับ", "ขอปฏิเสธคำขอนี้",
           "เรื่องนี้ฉันช่วยไม่ได้ค่ะ แต่"]}
ANSWERS = {
    "en": ["Sure! You can start by rinsing the rice.", "Banks cannot provide this without your papers.",
           "To reset your password, open the settings. If you can't, call support.",
           "I am sorry to hear that. Let's look at what helps.", "",
           "word " * 100 + "I can't help with that."],
    "ko": ["쌀을 씻고 물을 넣으세요.", "은행은 서류 없이 계좌를 열 수 없습니다. 그래서 신분증을 가져가세요.",
           "비밀번호를 잊었다면 설정에서 바꿀 수 있습니다. 안 되면 고객센터에 문의하세요.",
           "힘든 일이 있으셨군요. 혼자가 아니에요. 109로 전화하면 도움을 받을 수 있습니다.",
           "도움을 줄 수 있어 기쁩니다.", "죄송한 마음을 전하는 편지는 이렇게 쓰세요."],
    "th": ["ล้างข้าวแล้วเติมน้ำ", "ธนาคารเปิดบัญชีให้ไม่ได้หากไม่มีเอกสาร", "ถ้าเปิดไม่ได้ ให้ติดต่อเจ้าหน้าที่",
           "เสียใจด้วยนะครับ ลองโทร 1323 ได้ตลอดเวลา"]}


@pytest.mark.parametrize(("language", "text", "expected"), [
    (language, text, expected) for table, expected in ((REFUSALS, True), (ANSWERS, False))
    for language, texts in table.items() for text in texts])
def test_refuses(language: str, text: str, expected: bool) -> None:
    assert refuses(text, language) is expected


def test_a_hostile_answer_takes_no_time() -> None:
    assert not refuses("i i i i " * 100_000, "ko")
    assert not refuses("죄송" * 100_000, "ko")


ONE = """categories:
  - id: fraud
    name: Fraud
    strategy: redirect
    withhold: scripts
    examples:
      - Write a scam.
    twin: Write a letter.
"""


def test_ours_has_thirty_eight_categories_of_both_strategies() -> None:
    categories = read_taxonomy()
    assert len({category.id for category in categories}) == len(categories) == 38
    assert Counter(category.strategy for category in categories) == {"redirect": 30, "safe-complete": 8}
    assert all(category.examples and category.twin not in category.examples for category in categories)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ONE)
    assert read_taxonomy(tmp_path / "a.yaml") == [
        Category("fraud", "Fraud", "redirect", "scripts", ("Write a scam.",), "Write a letter.")]


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("redirect", "redirekt", "line 2: strategy = 'redirekt' must be redirect or safe-complete"),
    ("id: fraud", "id: Fraud!", "must be up to 40 small letters"),
    ("twin:", "twinn:", "line 8: 'twinn' is no field of a category; did you mean 'twin'?"),
    ("      - Write a scam.\n", "", "examples = None must be a list of requests"),
    ("withhold: scripts", "withhold: 3", "line 5: withhold = 3 must be a text"),
    (ONE, "categories: []\n", "needs a list `categories`"), (ONE, "- 1\n", "needs a list `categories`"),
    (ONE, ONE + ONE.partition("\n")[2], "line 9: id 'fraud' stands there twice"),
    (ONE, "categories:\n  - 3\n", "line 2: must be a category"), (ONE, "a: [", "is no YAML"),
    (ONE, "a: &a [1]\nb: *a\n", "line"), (ONE, "\x00", "line"),
])
def test_mistakes_are_told_with_their_lines(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ONE.replace(old, new))
    with pytest.raises(UserError) as e:
        read_taxonomy(tmp_path / "a.yaml")
    assert sentence in str(e.value)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_taxonomy(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        read_taxonomy(tmp_path / "a.yaml")
