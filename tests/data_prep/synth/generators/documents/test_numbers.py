"""Numbers of texts as values, in several languages."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from data_prep.synth.generators.documents.numbers import numbers_of


@pytest.mark.parametrize(("text", "language", "stated"), [
    ("1,200,000 people, or 1.2 million", "en", {"1200000"}),
    ("120만 명", "ko", {"1200000"}),
    ("3만 5천 원과 1조 2천억 원", "ko", {"35000", "1200000000000"}),
    ("제5조에 따라 5조 원을 낸다", "ko", {"5", "5000000000000"}),
    ("1.234,5 und 3 Millionen", "de", {"2469/2", "3000000"}),
    ("約３万人、1億2千万", "ja", {"30000", "120000000"}),
    ("๑๒ คน และ 5 ล้าน", "th", {"12", "5000000"}),
    ("2024-03-05, 10:30, 3.14.15", "en", {"2024", "3", "5", "10", "30", "14", "15"}),
    ("B52 and H2O over 10km in the 1990s", "en", {"10", "1990"}),
    ("1 000 000 km en 2019 200 fois", "fr", {"1000000", "2019", "200"}),
    ("3.50 is 3.5, and 007 is 7", "en", {"7/2", "7"}),
])
def test_numbers_are_known_by_their_value(text: str, language: str, stated: set[str]) -> None:
    assert numbers_of(text, language).stated == stated


def test_words_and_months_are_known_beside_digits() -> None:
    assert {"3", "25"} <= numbers_of("Three ships in March, twenty-five men", "en").told
    assert "3" in numbers_of("배 세 척", "ko").told
    assert numbers_of("세종", "ko").known == frozenset()
    assert "12" in numbers_of("ธันวาคม", "th").told


def test_a_million_told_after_digits_is_no_number_of_its_own() -> None:
    assert "1000000" not in numbers_of("1.2 million", "en").known


@given(st.integers(0, 10**12), st.integers(0, 999))
def test_thousands_may_be_set_apart(whole: int, thousandths: int) -> None:
    plain = f"{whole}.{thousandths:03d}"
    apart = f"({whole:,}.{thousandths:03d})"
    assert numbers_of(apart, "en").stated == numbers_of(f"x {plain} y", "en").stated
    german = f"{whole:,}".replace(",", ".") + f",{thousandths:03d}"
    assert numbers_of(german, "de").stated == numbers_of(plain, "en").stated


@given(st.integers(1, 9_999), st.integers(1, 9_999))
def test_korean_units_multiply(ten_thousands: int, ones: int) -> None:
    assert numbers_of(f"{ten_thousands}만 {ones}명", "ko").stated == {str(ten_thousands * 10_000 + ones)}


@pytest.mark.parametrize("text", ["9" * 5_000, "1,2," * 2_000, "1 " * 3_000, "만" * 50_000, "5만 " * 2_000])
def test_hostile_digits_end(text: str) -> None:
    for language in ("en", "ko", "de"):
        assert all(re.fullmatch(r"[\d/.]+", value) for value in numbers_of(text, language).stated)


@pytest.mark.parametrize(("text", "worded"), [
    ("five hundred ships", {"500"}), ("twenty-five men and one dog", {"25"}), ("one, two, three", set()),
    ("two hundred and five thousand", {"205000"}), ("two thousand and twenty four", {"2024"}),
    ("He was twenty. Five men came", {"20"}), ("twelve and thirteen", {"12", "13"}), ("a second one", set()),
    ("one million two hundred thousand", {"1200000"}), ("ninety nine hundred", {"9900"}),
    ("a hundred", set()),
])
def test_numbers_in_words_are_counted_as_they_are_meant(text: str, worded: set[str]) -> None:
    assert numbers_of(text).worded == worded <= numbers_of(text).known
