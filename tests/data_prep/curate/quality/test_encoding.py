"""Text that was decoded with a wrong encoding is restored; other text is unchanged."""

from pathlib import Path

import pytest
from datatrove.pipeline.formatters import FTFYFormatter

from data_prep.curate.quality.encoding import EncodingRepairSettings, RepairEncoding, repair_encoding
from data_prep.curate.sources.html import extract_page_text
from tests.data_prep.curate.pipeline.memory_view import doc

DECLARATION = Path(__file__).parent / "rules/declaration"
SENTENCES = {
    "en": "“It’s late,” she said — and the clock struck nine… 10 km, £5, 30 °C, naïve ½.",
    "ko": "모든 국민은 법 앞에 평등하다. “인용”과 ‘따옴표’, 가운뎃점 · 쉼표…",
    "th": "ผู้ใดกระทำความผิดตามพระราชบัญญัตินี้ต้องระวางโทษจำคุกไม่เกินหนึ่งปี",
    "fr": "L’été dernier, « l’âme » de Noël à Besançon : où ça ? Œuvre, naïf, aïeul, À bientôt !",
    "de": "Die größeren Städte an den Flüssen: Übermut, Ärger, „Zitat“, Straße.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "pt": "SÃO PAULO, JOÃO E A AÇÃO: não há coração sem mãe. ÂNGULO, Ã, À.",
    "ja": "すべての人間は、生まれながらにして自由であり、「尊厳」と権利とについて平等である。",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. «Да» — №5.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "cs": "Příliš žluťoučký kůň úpěl.", "emoji": "Fine 👍🏽 ❤️ ½ × 3 ≠ 2",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İĞŞ",
    "forms": "e\u0301 ﬁ ｆｕｌｌ ‘’ “” &amp; ① ㎏ \u200b ´ ¨ ©®™"}
"""Language, or kind of characters -> correctly decoded text."""


@pytest.mark.parametrize("language", SENTENCES)
def test_correctly_decoded_text_is_unchanged(language: str) -> None:
    text = SENTENCES[language] + "\n\n  " + SENTENCES[language] + "\t\n"
    assert repair_encoding(text) == (text, 0)


@pytest.mark.parametrize("language", ["en", "ko", "th"])
def test_declarations_survive_and_are_restored(language: str) -> None:
    text = (DECLARATION / f"{language}.txt").read_text(encoding="utf-8")
    assert repair_encoding(text) == (text, 0)
    broken = text.encode().decode("latin-1")
    num_lines = sum(not line.isascii() for line in text.split("\n"))
    assert repair_encoding(broken) == (text, num_lines)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "macroman", "cp1251"])
@pytest.mark.parametrize("language", ["en", "fr", "de", "ru", "emoji"])
def test_restored_lines_equal_datatrove(language: str, encoding: str) -> None:
    try:
        broken = SENTENCES[language].encode().decode(encoding)
    except UnicodeDecodeError:
        broken = SENTENCES[language].encode().decode(encoding, "ignore")
    other_repairs = ("remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes",
                     "fix_line_breaks", "fix_surrogates", "remove_control_chars", "unescape_html")
    theirs = FTFYFormatter(**dict.fromkeys(other_repairs, False), normalization=None).format(broken)
    assert repair_encoding(broken)[0] == theirs.rstrip()


@pytest.mark.parametrize(("broken", "restored"), [
    ("donâ€™t", "don’t"), ("CafÃ© crÃ¨me", "Café crème"), ("voilÃ\xa0 tout", "voilà tout"),
    ("ì•ˆë…•í•˜ì„¸ìš”", "안녕하세요"), ("cittÃ\xa0", "città"), ("wait\x85 then", "wait… then"),
    ("Ã¢â‚¬Å“twiceÃ¢â‚¬Â\x9d", "“twice”"), ("â\x80\x9cquoteâ\x80\x9d", "“quote”"), ("10Â\xa0km", "10\xa0km"),
    ("올바른 글 and donâ€™t", "올바른 글 and don’t"), ("oneâ€¨two", "one\ntwo")])
def test_known_sequences_are_restored(broken: str, restored: str) -> None:
    text = f"Plain line.\n\n{broken}\nSÃO PAULO “x”"
    assert repair_encoding(text) == (f"Plain line.\n\n{restored}\nSÃO PAULO “x”", 1)


def test_pages_keep_the_bytes_that_are_needed() -> None:
    text, _ = extract_page_text("<body><p>voilÃ&nbsp; tout MarÃ&shy;a, soft&shy;hyphen&nbsp;x</p></body>")
    assert repair_encoding(text)[0] == "voilà tout María, softhyphen x"


def test_code_is_unchanged() -> None:
    code = "def test():\n    value = fix('donâ€™t')\n    assert value == 1\n    return value\n" * 3
    step = RepairEncoding(EncodingRepairSettings())
    assert step.judge_document(doc(code)).text is None
    assert step.judge_document(doc("donâ€™t", kind="math_code")).text is None
    assert step.judge_document(doc("I donâ€™t know.")).values == {"lines_repaired": 1}
