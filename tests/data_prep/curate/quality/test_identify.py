"""Languages, code and markup are identified, and documents kept by language."""

import ast
import inspect
import json
import textwrap
import time
from typing import Any

import pytest

from data_prep.curate.pipeline.step import Doc, StepOutcome
from data_prep.curate.quality.identify import (
    TABLES_FILE, Language, LanguageSettings, _load_model, detect_form, extract_language_text, get_model_file,
    identify_language, load_language_tables)
from tests.typed_words import keys_of

# Forms of a document (prose, code, markup), and the part of it that has a language.

C = """/* Copy a string. */
#include <stddef.h>

char *copy(char *to, const char *from)
{
    size_t i = 0;
    while ((to[i] = from[i]) != 0)
        i++;
    return to;
}
"""
CPP = """/*
 * Licence: everything that stands here is a long comment and no statement at all, over
 * several lines.
 */
template <typename T, class U>
std::vector<T> both(const std::vector<T>& a, std::pair<T, U> b)
{
    return a;
}
"""
GO = 'package main\n\nimport "fmt"\n\nfunc main() {\n\tx := 3\n\tfmt.Println("hello", x)\n}\n'
SHELL = '#!/bin/sh\nset -e\nfor f in *.txt; do\n  if [ -f "$f" ]; then\n    wc -l "$f"\n  fi\ndone\n'
JAVASCRIPT = "const a = b('a');\nfunction f(x) {\n  return x.map((y) => y + 1);\n}\nmodule.exports = f;\n"
TEX = "\\section{Rings}\nA \\emph{ring} $R$ is\n\\begin{itemize}\n\\item \\textbf{abelian}\n\\end{itemize}\n"
HTML = "<html><body><p>Hello <b>world</b></p><script>var hidden = 1;</script></body></html>"
PROSE = """The quick brown fox jumps over the lazy dog; then it sleeps.

1. First, open the file.
2. Then call `main()` and wait (it takes a while).

- A list item: with a colon
- Another one

"Is that all?" she asked. He said: yes == no?
"""


@pytest.mark.each(("form", "texts"), [
    ("code", [C, CPP, GO, SHELL, JAVASCRIPT, inspect.getsource(ast), inspect.getsource(textwrap)]),
    ("markup", [HTML, TEX, json.dumps({"a": [1, 2], "b": {"c": "d"}}, indent=1),
                "name: x\nsteps:\n  - run: a\n    with: b\n", "[core]\nbare = false\nurl = x\n"]),
    ("prose", [PROSE, "", "제1조 모든 인간은 자유롭다.\n제2조 모든 사람은 평등하다.\n",
               "今日は良い天気です;\nまた明日;",
               "Dear all,\n\nif you come, bring bread.\nReturn by five.\n\nYours, A.",
               inspect.getdoc(ast.NodeVisitor) * 3])])
def test_the_form_of_a_text_is_detected(form: str, texts: list[str]) -> None:
    assert [text for text in texts if detect_form(text) != form] == []


def test_code_has_the_language_of_its_comments_and_markup_of_its_text() -> None:
    assert extract_language_text("x = 1\n# 한국어 주석이다\ny = 2", "code") == " 한국어 주석이다"
    program = 'def f():\n    """문서다.\n\n    설명."""\n    return 1'
    assert extract_language_text(program, "code").split() == ["문서다.", '설명."""']
    assert extract_language_text(HTML, "markup").split() == ["Hello", "world"]
    assert "ring" in extract_language_text(TEX, "markup")
    assert "section" not in extract_language_text(TEX, "markup")


@pytest.mark.parametrize("text", [
    "<" * 200_000, "<!--" * 50_000, "<script" * 30_000, "import a" + ".a" * 100_000, "\\begin{" * 30_000,
    "a" * 1_000_000, " " * 1_000_000, "if " * 100_000, "@a" * 100_000, "x(" * 100_000, '"' * 100_000,
    "\n" * 300_000])
def test_hostile_lines_take_less_than_a_second(text: str) -> None:
    start = time.process_time()
    extract_language_text(text, detect_form(text))
    extract_language_text(text, "markup")
    assert time.process_time() - start < 1.0


SENTENCES = {
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "th": "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_identified(language: str) -> None:
    identified, score = identify_language(SENTENCES[language])
    assert identified == language
    assert score > 0.7


@pytest.mark.parametrize(("text", "language"), [
    ("GPU 메모리가 부족하면 batch size를 줄이고 gradient checkpointing을 켭니다.", "ko"),
    ("รันโค้ด Python ด้วยคำสั่ง python main.py", "th"),
    ("大韓民國의 首都는 서울이다. 漢字를 섞어 쓴 글이다.", "ko"),
    ("東京タワーの高さは333メートルです", "ja"),
    (SENTENCES["en"] * 40 + SENTENCES["ko"] * 2000, "ko")])  # the sample reaches the end of the text
def test_foreign_terms_do_not_change_the_language(text: str, language: str) -> None:
    assert identify_language(text)[0] == language


def test_a_mixed_text_has_the_score_of_its_share() -> None:
    language, score = identify_language((SENTENCES["ko"] + "\n") * 30 + (SENTENCES["th"] + "\n") * 10)
    assert language == "ko"
    assert 0.5 < score < 0.95  # three of four sentences


@pytest.mark.parametrize("text", ["", " \n", "1234 5678", "--- *** ---", "\x00\ud800\U000e0001", "😀😀"])
def test_text_without_letters_has_no_language(text: str) -> None:
    assert identify_language(text) == ("und", 0.0)


def test_every_language_of_the_model_has_its_script() -> None:
    tables = load_language_tables()
    known = set().union(*tables.sharing_script.values(), tables.by_script.values())
    missing = set(_load_model().labels) - known - {"zxx"}
    assert missing <= {"yue", "wuu", "grc", "hbo", "dz"}  # identified by their script


KOREAN = "이 문서는 설치 과정을 설명합니다. 데이터를 다시 내려받으세요."
ENGLISH = "This document describes how the system is installed. Please download the data again."
PYTHON = "import sys\n\n\ndef main(path):\n    for line in open(path):\n        sys.stdout.write(line)\n"


def judge_text(text: str, **settings) -> StepOutcome:
    return Language(LanguageSettings(**settings)).judge_document(Doc("a:0:0", text, "a", 0, 0))


def test_each_document_gets_its_language_and_form() -> None:
    assert judge_text(KOREAN).values["language"] == "ko"
    assert judge_text(ENGLISH).values == {
        "language": "en", "language_score": pytest.approx(0.97, abs=0.03), "form": "prose"}


ASIAN: dict[str, Any] = {"keep": ("ko", "th"), "min_score": 0.6}
"""Settings that keep Korean and Thai."""


@pytest.mark.each(("text", "settings", "reason"), [
    (KOREAN, ASIAN, ""), (ENGLISH, ASIAN, "language en"), ("12 + 30 = 42", ASIAN, "no language"),
    (PYTHON, ASIAN, ""), (KOREAN * 2 + ENGLISH * 2, ASIAN, "language not sure"),
    (PYTHON, {"forms": ("prose",)}, "form code"),
    ("<ul><li>One<li>Two</ul>", {"forms": ("prose", "code")}, "form markup"),
    ("Москва — столица России.", {}, ""), ("12 + 30 = 42", {"min_score": 0}, "")])
def test_documents_of_other_languages_and_forms_are_dropped(text: str, settings: dict[str, Any],
                                                            reason: str) -> None:
    assert judge_text(text, **settings).reason == reason


def test_tables_and_model_are_listed_as_input_files() -> None:
    assert Language(LanguageSettings()).list_files() == [TABLES_FILE, get_model_file()]
    assert get_model_file().stat().st_size > 1_000_000


def test_every_broken_rule_is_reported() -> None:
    wrong: Any = "proes"
    assert keys_of(LanguageSettings(keep=("ko", "jp"), min_score=1.5, forms=(wrong,))) == [
        "keep.1", "min_score", "forms.0"]
    assert keys_of(LanguageSettings(forms=())) == ["forms"]
