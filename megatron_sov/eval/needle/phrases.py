"""The sentences of needle tests, in each language of a haystack, and which of them are for tests alone.

A phrase is text with places ``{}`` for keys and values; a value stands right behind its key, so that
repeating the sentence up to the key asks for the value.  Kinds of tests and their sentences follow RULER
(arXiv 2404.06654).  A hash decides which phrases and which pairs of words belong to tests: training code asks
the same function, so nothing is ever in both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import get_args

from megatron_sov.config import Language

LANGUAGES: tuple[Language, ...] = get_args(Language)
TEST_PART = 5
"""One pair of words, or phrase, in this many is kept for tests."""


def is_for_tests(*parts: object) -> bool:
    """Return whether something, told by its parts, is for tests alone, at whatever run and data."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % TEST_PART == 0


@dataclass(frozen=True)
class Phrases:
    """The sentences of one form of test; the hash of `statement` decides for all of them."""

    statement: str
    """Key, value."""
    all_values: str
    """Asks for all values of a key, which follow."""
    values_of: str
    """Asks for the values of four keys, which follow in this order."""
    assignment: str
    """Variable, then a value or a variable that was assigned before."""
    holders: str
    """Asks for all variables that hold a value, which follow."""

    @property
    def for_tests(self) -> bool:
        """Whether training never sees these."""
        return is_for_tests(self.statement)

    def texts(self) -> dict[str, str]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def phrases(language: Language, *, test: bool) -> tuple[Phrases, ...]:
    """Return a language's phrases for tests, or those for training."""
    return tuple(p for p in PHRASES[language] if p.for_tests == test)


def _english(noun: str, plural: str, variable: str, place: str) -> Phrases:
    return Phrases(f"\nThe {noun} {place}{{}}{{}}.", f"\nAll {plural} {place}{{}}:",
                   f"\nThe {plural} {place}{{}},{{}},{{}},{{}}:", f"\n{variable}{{}} ={{}}.",
                   f"\nEvery {variable} that is{{}}:")


def _korean(noun: str, variable: str) -> Phrases:
    return Phrases(f"\n{noun}{{}}{{}}.", f"\n모든 {noun}{{}}:", f"\n차례대로 {noun}{{}},{{}},{{}},{{}}:",
                   f"\n{variable}{{}} ={{}}.", f"\n값이 같은 모든 {variable}{{}}:")


def _thai(noun: str, variable: str) -> Phrases:
    return Phrases(f"\n{noun}{{}}{{}}.", f"\n{noun}ทั้งหมด{{}}:", f"\n{noun}ตามลำดับ{{}},{{}},{{}},{{}}:",
                   f"\n{variable}{{}} ={{}}.", f"\n{variable}ทุกตัวที่มีค่า{{}}:")


def _code(name: str, variable: str) -> Phrases:
    return Phrases(f"\n{name}.add({{}}{{}})", f"\n{name}.all({{}}):", f"\n{name}.get({{}},{{}},{{}},{{}}):",
                   f"\n{variable}{{}} ={{}};", f"\n{variable}.holders({{}}):")


PHRASES: dict[Language, tuple[Phrases, ...]] = {
    "english": (
        _english("value", "values", "field", "of"), _english("code", "codes", "variable", "of"),
        _english("number", "numbers", "name", "for"), _english("label", "labels", "letter", "on"),
        _english("price", "prices", "unit", "of"), _english("owner", "owners", "entry", "of"),
    ),
    "korean": tuple(_korean(n, v) for n, v in (("암호는", "변수"), ("번호는", "이름"), ("주소는", "항목"),
                                               ("비밀은", "기호"), ("색깔은", "표시"), ("가격은", "단위"),
                                               ("주인은", "문자"), ("열쇠는", "상자"))),
    "thai": tuple(_thai(n, v) for n, v in (
        ("รหัสของ", "ตัวแปร"), ("หมายเลขของ", "ชื่อ"), ("ที่อยู่ของ", "รายการ"), ("ความลับของ", "สัญลักษณ์"),
        ("สีของ", "เครื่องหมาย"), ("ราคาของ", "หน่วย"), ("เจ้าของ", "ตัวอักษร"), ("กุญแจของ", "กล่อง"))),
    "code": tuple(_code(n, v) for n, v in (("codes", "var"), ("table", "let"), ("registry", "auto"),
                                           ("cache", "val"), ("lookup", "const"), ("index", "set"),
                                           ("store", "def"), ("mapping", "local"))),
}
"""Enough forms in each language that the hash gives some to both sides."""
