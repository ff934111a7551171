"""Step `pii`: masked personal data in each language, and similar text that is not personal data."""

import random
import time
from itertools import pairwise

import pytest

from data_prep.curate.pipeline.step import Doc, StepOutcome
from data_prep.curate.quality.pii.step import (
    FINDERS, IBAN_CHARS, Pii, PiiSettings, find_personal_data, is_card, is_iban, is_korean_rrn, is_thai_id,
    load_masked_names)
from megatron_sov.base.settings import find_all_problems


def judge_text(text: str, language: str = "en", form: str = "prose", **settings) -> StepOutcome:
    document = Doc("a:0:0", text, "a", 0, 0, {"language": language, "form": form})
    return Pii(PiiSettings(**settings)).judge_document(document)


@pytest.mark.parametrize(("language", "text", "masked", "pii"), [
    ("en", "Write to jane.doe+x@mail.co.uk, or call (415) 555-2671.",
     "Write to [email address], or call [phone number].", "email=1 phone=1"),
    ("ko", "연락처:010-1234-5678 02-123-4567입니다", "연락처:[전화번호] [전화번호]입니다", "phone=2"),
    ("ko", "주민번호는 900101-1234568이다", "주민번호는 [주민등록번호]이다", "korean_rrn=1"),
    ("th", "โทร 081-234-5678 เลข 1-1017-00230-70-8",
     "โทร [หมายเลขโทรศัพท์] เลข [เลขประจำตัวประชาชน]", "thai_id=1 phone=1"),
    ("ja", "電話は03-3580-3311、090-1234-5678です", "電話は[電話番号]、[電話番号]です", "phone=2"),
    ("en", "card 4111 1111 1111 1111 or 4111-1111-1111-1111",
     "card [card number] or [card number]", "card=2"),
    ("en", "from 81.2.69.142 and 2001:4860:4860::8888", "from [IP address] and [IP address]", "ip=2"),
    ("en", "key AKIAIOSFODNN7EXAMPLE, ghp_" + "a1B2" * 9, "key [secret key], [secret key]", "api_key=2"),
    ("en", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nab==\n-----END RSA PRIVATE KEY-----",
     "[secret key]", "api_key=1"),
    ("de", "AT61 1904 3002 3457 3201 BIC BKAUATWW, BE68539007547034 DE89 3704 0044 0532 0130 00",
     "[Kontonummer] BIC BKAUATWW, [Kontonummer] [Kontonummer]", "iban=3")])
def test_personal_data_is_replaced_by_the_name_of_its_kind(language: str, text: str, masked: str,
                                                           pii: str) -> None:
    assert judge_text(text, language) == StepOutcome(text=masked, values={"pii": pii})


@pytest.mark.parametrize("text", [
    "Version 10.20.30.40 came after v12.34.56.78 and release 3.14.159.26",
    "On 2024-01-02 10:20:30, pages 100-2000, 1990-2004, 12.11.2023 and 01/02/2003",
    "ISBN 978-3-16-148410-0, DOI 10.1000/182, RFC 2822, ISO 8859-1, Unicode 15.1.0",
    "pi is 3.14159265358979, e 2.718281828, 4111111111111112 and 1234 5678 9012 3456",
    "icon@2x.png, git@github.com:a/b.git, lodash@4.17.21, user@localhost, foo@example.com, @decorator",
    "https://me:secret@host.org/x and ftp://me:secret@host.org",
    "127.0.0.1, 192.168.100.200, 10.20.30.40, 203.0.113.99, 255.255.255.255, 12:34:56 and a::b",
    "sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709, 0x7fffffffffff, 550e8400-e29b-41d4-a716-446655440000",
    "timestamps 1700000000, 1700000000000 and 20240102030405",
    "US 1234567890 and 98765 43210, +14155552671.5",
    "row 10 20 30 40 50 60\nrow 11 21 31 41 51 61", "sk-learn, hf_hub and AIza"])
@pytest.mark.parametrize("language", ["en", "ko", "th", "ja", "de", "es", "vi"])
def test_versions_dates_and_numbers_are_not_masked(text: str, language: str) -> None:
    assert judge_text(text, language) == StepOutcome(values={"pii": ""})


def test_masking_code_leaves_its_syntax_intact() -> None:
    text = 'NAME = "jane@mail.org"  # 02-123-4567'
    assert judge_text(text, "ko", form="code").text == 'NAME = "[이메일 주소]"  # 02-123-4567'


def test_kinds_placeholder_and_names_are_settings() -> None:
    text = "jane@mail.org 81.2.69.142"
    assert judge_text(text, mask=("ip",)).text == "jane@mail.org [IP address]"
    assert judge_text(text, "ko", placeholder="<{name}>",
                      names_in="en").text == "<email address> <IP address>"


def test_every_kind_has_names_in_the_languages_of_the_recipes() -> None:
    assert set(load_masked_names()) == set(FINDERS)
    for names in load_masked_names().values():
        assert set(names) >= {"ko", "en", "th", "es", "de", "ja", "vi"}


def test_every_broken_rule_is_reported() -> None:
    settings = PiiSettings(mask=("mail",), mask_in_code=("ip", "iq"), placeholder="{x}", names_in="xx")
    problems = find_all_problems(settings)
    assert [p.key for p in problems] == ["mask.0", "mask_in_code.1", "placeholder", "names_in"]
    assert "email" in problems[0].sentence


def test_spans_never_overlap_and_hostile_text_takes_linear_time() -> None:
    draw = random.Random(5)
    pieces = ["010-1234-5678", "jane@mail.org", "4111 1111 1111 1111", "1-1017-00230-70-8", " ", ".", "-",
              "+", "7", "81.2.69.142", "DE89 3704 0044 0532 0130 00", "(", ")", "가"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=20))
        spans = find_personal_data(text, draw.choice(["ko", "en", "th"]), list(FINDERS))
        assert all(before[1] <= after[0] for before, after in pairwise(spans))  # (start, stop, kind)
    for text in ("1 " * 20_000, "1-" * 30_000, "a@" * 50_000, "a.b@c." * 20_000, "::" * 50_000,
                 "+(1" * 20_000, "-----BEGIN PRIVATE KEY-----" * 3_000, "eyJ" + "a" * 200_000,
                 "AB12" * 50_000):
        start = time.process_time()
        find_personal_data(text, "en", list(FINDERS))
        assert time.process_time() - start < 1.5


CARDS = ["4111111111111111", "5555555555554444", "2223003122003222", "378282246310005", "6011111111111117",
         "3530111333300000", "30569309025904", "6200000000000005"]
IBANS = ["DE89370400440532013000", "GB29NWBK60161331926819", "FR1420041010050500013M02606",
         "NO9386011117947", "MT84MALT011000012345MTLCAST001S", "VG96VPVG0000012345678901",
         "OM810180000001299123456", "MN121234123456789123", "SO211000001001000100141"]


@pytest.mark.parametrize("number", CARDS)
def test_card_numbers_of_issuers_are_found_by_their_check_digit(number: str) -> None:
    assert is_card(number)
    assert not any(is_card(number[:-1] + d) for d in "0123456789" if d != number[-1])


@pytest.mark.parametrize("digits", ["0000000000000000", "1234567812345670", "411111111111111", "9" * 16,
                                    "4" * 16])
def test_numbers_of_other_lengths_and_ranges_are_not_personal_data(digits: str) -> None:
    assert not is_card(digits)


@pytest.mark.parametrize("number", IBANS)
def test_examples_of_the_iban_registry_are_found(number: str) -> None:
    assert is_iban(number)
    assert not is_iban(number[:-1] + ("1" if number[-1] != "1" else "2"))
    assert not is_iban(number + "0")


def test_ibans_have_possible_lengths() -> None:
    assert len(IBAN_CHARS) > 70
    assert all(15 <= chars <= 34 for chars in IBAN_CHARS.values())


def build_resident_number(first: str, base: int = 11) -> str:
    """Return a Korean resident number: 12 digits and their check digit.

    Args:
        first: birth date (6 digits), sex and century, place and serial number.
        base: 11, or 13 for residents of another nationality.
    """
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    weighted_sum = sum(int(digit) * weight for digit, weight in zip(first, weights, strict=True))
    return first + str((base - weighted_sum % 11) % 10)


def test_resident_numbers_have_a_date_and_until_2020_a_check_digit() -> None:
    assert is_korean_rrn(build_resident_number("900101123456"))
    assert is_korean_rrn(build_resident_number("900101523456", base=13))
    assert not is_korean_rrn(build_resident_number("901301123456"))
    assert not is_korean_rrn(build_resident_number("900101123456")[:-1] + "0")
    assert is_korean_rrn("2101013000000")
    assert not is_korean_rrn("9001011")


def test_one_of_ten_random_numbers_passes_a_check_digit() -> None:
    draw = random.Random(1)
    thai = sum(is_thai_id(str(draw.randrange(1, 9)) + f"{draw.randrange(10**12):012}") for _ in range(5000))
    assert 400 < thai < 600
    assert is_thai_id("1101700230708")
    assert not is_thai_id("0101700230708")
