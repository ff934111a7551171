"""What a translation has to keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.synth.generators.translation import (
    KEPT,
    glossary_verdict,
    kept_verdicts,
    read_glossary,
    terms_in,
    translated_verdicts,
)
from megatron_sov.errors import UserError


def failed(made: str, source: str, keep_quotes: bool = True) -> set[str]:
    """Return the checks that a translation from English into Korean does not pass."""
    return {v.check for v in (*kept_verdicts(made, source, "ko", "en", keep_quotes),
                              *translated_verdicts(made, source, "ko", keep_quotes, 0.1)) if not v.passed}


@pytest.mark.parametrize(("source", "made", "checks"), [
    ("Sum `a + b` for {name} at https://a.example/x?y=1.",
     "{name}을 위해 https://a.example/x?y=1 에서 `a + b`를 더하라.", set()),
    ("Sum `a + b`.", "`a + c`를 더하라.", {"code and placeholders"}),
    ("Hello %s, see <b>this</b>.", "안녕하세요 %s님, 이것을 보세요.", {"code and placeholders"}),
    ("Pay 5 euros by March 3.", "3월 3일까지 5유로를 내시오.", set()),
    ("It costs $5 or $6, and $x^2$ is x squared.", "5달러나 6달러이며 $x^2$은 엑스의 제곱이다.", set()),
    ("Pay 5 euros.", "6유로를 내시오.", {"numbers"}),
    ("Pay five euros.", "5유로를 내시오.", set()),
    ("What does “break a leg” mean?", "“break a leg”은 무슨 뜻인가?", set()),
    ("What does “break a leg” mean?", "“다리를 부러뜨려라”는 무슨 뜻인가?", {"quotes"}),
    ("This is a text that nobody translated.", "This is a text that nobody translated.",
     {"language", "untranslated"}),
    ("The house is old. Nobody lives in it, and the roof has long since fallen down.",
     "집이 낡았고 오래전부터 아무도 그곳에 살지 않으며 지붕도 무너졌다. "
     "and the roof has long since fallen down", {"untranslated"}),
])
def test_what_is_lost_is_seen(source: str, made: str, checks: set[str]) -> None:
    assert failed(made, source) == checks


def test_quotes_are_kept_by_wish_alone() -> None:
    source = "What does “break a leg” mean?"
    assert failed("“다리를 부러뜨려라”는 무슨 뜻인가?", source, keep_quotes=False) == set()


def test_a_glossary_is_lines_of_terms(tmp_path: Path) -> None:
    file = tmp_path / "terms.tsv"
    file.write_text("# notes\ntoken\t토큰\nlearning rate\t학습률\n\n", encoding="utf-8")
    glossary = read_glossary(file)
    assert glossary == [("token", "토큰"), ("learning rate", "학습률")]
    assert terms_in("The learning rate of a tokenizer", glossary) == [("learning rate", "학습률")]
    assert glossary_verdict("학습률", "The learning rate", glossary).passed
    assert not glossary_verdict("배움의 속도", "The learning rate", glossary).passed


@pytest.mark.parametrize(("content", "told"), [
    (b"token\n", "terms.tsv:1: is no TERM"), (b"a\tb\na\tc\n", "terms.tsv:2: translates 'a' again"),
    (b"\xff\xfe", "is no text in UTF-8"), (b"a\t\n", "terms.tsv:1"),
    (b"x" * (1 << 21), "is longer than 1 MiB")])
def test_a_broken_glossary_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "terms.tsv").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_glossary(tmp_path / "terms.tsv")


def test_a_glossary_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_glossary(tmp_path / "none.tsv")


@pytest.mark.parametrize("piece", [
    "`", "$", "{", "<a", "\\(", "http://", "a@a.", "%(", "```", "$$", "[A", "{{", "a."])
def test_hostile_texts_end(piece: str) -> None:
    assert KEPT.findall(piece * 20_000) is not None
