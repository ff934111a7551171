"""Refusals are told from answers by their beginnings, in three languages."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.safety.refusals import refuses

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
