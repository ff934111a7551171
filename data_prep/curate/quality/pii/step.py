"""Step `pii`: replace personal data by placeholders with the kind's name, e.g. [email]."""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import Bound, ProblemCode, Violation, choice_from

# Finders yield spans only if the surrounding text and the check digits confirm them: versions, dates,
# identifiers and measurements look like personal numbers.

Span = tuple[int, int]
REGIONS = {
    "ko": ("KR",), "th": ("TH",), "ja": ("JP",), "vi": ("VN",), "zh": ("CN", "TW", "HK"), "en": ("US", "GB"),
    "de": ("DE", "AT", "CH"), "es": ("ES", "MX", "AR", "CO"), "fr": ("FR", "BE", "CA"), "it": ("IT",),
    "pt": ("BR", "PT"), "ru": ("RU",), "nl": ("NL",), "pl": ("PL",), "tr": ("TR",), "id": ("ID",),
    "uk": ("UA",), "hi": ("IN",)}
"""Language -> countries whose numbering plans apply to numbers without a country code."""
_MAX_PARTS = 4
_PART = re.compile(r"(?<![\w.,/@#$%=\-])\(?\+?\(?\d[\d\-.()]{0,20}(?<=[\d)])(?![\w%]|[.,:/\-@]\w)",
                   re.ASCII)
"""Digits with the separators inside a phone number, without spaces."""
_ANNOUNCED = re.compile(r"(?:\btel|phone|\bfax|mobile|\bcall|전화|휴대폰|연락처|팩스|โทร|แฟกซ์|電話|携帯"
                        r"|电话|手机|điện thoại|sđt|teléfono|móvil|telefon|handy|téléphone|телефон)"
                        r"[^\n\d]{0,12}$", re.IGNORECASE)
_CARDS = (
    ("4", "4", (13, 16, 19)), ("51", "55", (16,)), ("2221", "2720", (16,)), ("34", "34", (15,)),
    ("37", "37", (15,)), ("6011", "6011", (16, 19)), ("644", "659", (16, 19)), ("3528", "3589", (16, 19)),
    ("300", "305", (14,)), ("36", "36", (14,)), ("38", "39", (14,)), ("62", "62", (16, 17, 18, 19)))
"""Large card issuers: lowest and highest first digits, and allowed lengths (ISO/IEC 7812)."""
_IBAN_CHARS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 "
    "DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 "
    "IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 "
    "MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 "
    "SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30")
IBAN_CHARS = {entry[:2]: int(entry[2:]) for entry in _IBAN_CHARS.split()}
"""Country -> IBAN length in characters (ISO 13616, SWIFT registry)."""
_LAST_RRN_WITH_CHECK = date(2020, 10, 1)
"""Since this date the last six digits are random."""
_NO_BIRTH_YET = date(2036, 1, 1)
"""Upper bound for birth dates; fixed, so that a text is masked alike in every year."""
_RRN_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
_EMAIL = re.compile(r"(?<![\w.+/-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
                    r"(?![\w@-]|\.\w|:[\w~/.])", re.ASCII)
"""Excludes git@host followed by a path, an address for code."""
_PASSWORD_BEFORE = re.compile(r"//[^\s/]*:$")
"""Text before the password in a URL with user:password@host."""
_NO_DOMAIN = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|org|net))?|test|invalid|localhost|local)$|"
                        r"\.(?:png|jpe?g|gif|svg|webp|js|css|html?|json|md|txt|py|java|zip|gz)$",
                        re.IGNORECASE)
"""Domains reserved for examples (RFC 2606), and file names such as icon@2x.png."""
_IP4 = re.compile(r"(?<![\w.\-/])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\w)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{1,4}:)[0-9A-Fa-f:]{8,39}(?![\w:.])", re.ASCII)
_MIN_IP4_CHARS = 10
"""Shorter addresses, such as 1.2.3.4, are mostly versions and chapters."""
_VERSION_BEFORE = re.compile(r"(?:\bv|versions?|release|ver\.?|rev\.?|build|section|§|chapter|\boid|버전"
                             r"|版本|バージョン|เวอร์ชัน|phiên bản|versión)[\s:=v]*$", re.IGNORECASE)
_IBAN = re.compile(r"(?<!\w)(?=([A-Z]{2}\d{2}(?: ?[0-9A-Z]{1,4}){3,8}))", re.ASCII)
"""An IBAN, possibly with the following text, such as a BIC or a second IBAN."""
_BEFORE, _BEHIND = r"(?<![\w.,/@#$%=\-+])", r"(?![\w%]|[.,:/\-@]\w)"
_CARD = re.compile(rf"{_BEFORE}(?:\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{1,4}}(?:\1\d{{1,3}})?"
                   rf"|\d{{4}}([ -])\d{{6}}\2\d{{4,5}}|\d{{13,19}}){_BEHIND}", re.ASCII)
_RRN = re.compile(rf"{_BEFORE}(?:\d{{6}} ?- ?\d{{7}}|\d{{13}}){_BEHIND}", re.ASCII)
_THAI_ID = re.compile(rf"{_BEFORE}(?:\d([ -])\d{{4}}\1\d{{5}}\1\d{{2}}\1\d|\d{{13}}){_BEHIND}", re.ASCII)
_API_KEY = re.compile(
    r"(?<![A-Za-z0-9_])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{50,251}"
    r"|glpat-[A-Za-z0-9_\-]{20,60}|xox[abeprs]-[A-Za-z0-9-]{10,120}|AIza[0-9A-Za-z_\-]{35}|hf_[A-Za-z]{34}"
    r"|sk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_\-]{32,200}|[rs]k_live_[A-Za-z0-9]{24,99}|npm_[A-Za-z0-9]{36}"
    r"|pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_\-]{50,250}|SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}"
    r"|eyJ[A-Za-z0-9_\-]{10,2000}\.eyJ[A-Za-z0-9_\-]{10,4000}\.[A-Za-z0-9_\-]{10,2000})"
    r"(?![A-Za-z0-9_])"
    r"|-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----[^-]{0,20000}-----END (?:[A-Z]+ ){0,3}PRIVATE KEY-----")
"""Key formats that issuers publish for secret scanning, and PEM private keys."""
NAME = "{name}"
"""Part of the placeholder that is replaced by the kind's name."""
NAMES_FILE = Path(__file__).with_name("names.yaml")
Finder = Annotated[str, choice_from(lambda: FINDERS)]
"""Kind in `FINDERS`."""


def find_phones(text: str, language: str) -> Iterator[Span]:
    """Yield phone numbers with a country code, or in a format and plan for `language`'s countries.

    Bare digits count for mobile numbers only.
    """
    parts = [m.span() for m in _PART.finditer(text)]
    place = 0
    while place < len(parts):
        # The longest valid run of parts wins, because shorter runs may be numbers too.
        length = next((n for n in range(_MAX_PARTS, 0, -1)
                       if _is_phone(text, parts[place:place + n], n, language)), 0)
        if length:
            yield parts[place][0], parts[place + length - 1][1]
        place += length or 1


def _is_phone(text: str, parts: list[Span], num_parts: int, language: str) -> bool:
    # A single space joins parts of a number; wider gaps separate table columns.
    if len(parts) < num_parts or any(text[a[1]:b[0]] != " " for a, b in pairwise(parts)):
        return False
    start, stop = parts[0][0], parts[-1][1]
    written = text[start:stop]
    num_digits = sum(map(str.isdigit, written))
    # E.164 allows at most 15 digits; local numbers with fewer than 8 look like any number.
    if not 8 <= num_digits <= 15:
        return False
    is_announced = bool(_ANNOUNCED.search(text, max(start - 30, 0), start))
    return _has_phone_format(written, is_announced) and _is_valid_phone(written, language)


def _has_phone_format(written: str, is_announced: bool) -> bool:
    """Return whether digits are grouped like a phone number, not like a date, a sum or a table."""
    groups = re.findall(r"\d+", written)
    # A single point belongs to a decimal number or a sum.
    if written.count(".") == 1:
        return False
    if written.lstrip("(").startswith("+"):
        return True
    if len(groups) == 1:
        return is_announced or (len(written) in (10, 11) and written.startswith("0"))
    lengths = list(map(len, groups))
    is_date = sorted(lengths) in ([1, 1, 4], [1, 2, 4], [2, 2, 4])
    if is_date or len(groups) > 5 or min(lengths) < 2 or max(lengths) > 8:
        return False
    return is_announced or written[0] in "(0" or (lengths == [3, 3, 4] and " " not in written)


def _is_valid_phone(written: str, language: str) -> bool:
    import phonenumbers  # optional package

    is_bare = written.isdigit()
    international = written.lstrip("(").startswith("+")
    # With a country code any plan counts; otherwise the plans for the language.
    for region in (None,) if international else REGIONS.get(language, ()):
        try:
            number = phonenumbers.parse(written, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number) and (
                not is_bare or phonenumbers.number_type(number) == phonenumbers.PhoneNumberType.MOBILE):
            return True
    return False


def is_card(digits: str) -> bool:
    """Check issuer range, length and Luhn's check digit (ISO/IEC 7812-1, annex B)."""
    if not any(len(digits) in lengths and low <= digits[:len(low)] <= high for low, high, lengths in _CARDS):
        return False
    # Luhn: every second digit from the right is replaced by the digit sum of its double, from the table.
    backwards = digits[::-1]
    total = sum(map(int, backwards[::2])) + sum(int("0246813579"[int(d)]) for d in backwards[1::2])
    return total % 10 == 0


def is_korean_rrn(digits: str) -> bool:
    """Check a Korean resident registration number: birth date, sex and century digit, check digit.

    Births since October 2020 have no check digit; the check digit for foreigners is shifted by 2.
    """
    if len(digits) != 13:
        return False
    century = {"9": 1800, "0": 1800, "1": 1900, "2": 1900, "3": 2000, "4": 2000,
               "5": 1900, "6": 1900, "7": 2000, "8": 2000}[digits[6]]
    try:
        born = date(century + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return False
    if born >= _LAST_RRN_WITH_CHECK:
        return born < _NO_BIRTH_YET
    total = sum(int(d) * weight for d, weight in zip(digits[:12], _RRN_WEIGHTS, strict=True))
    base = 13 if digits[6] in "5678" else 11
    return (base - total % 11) % 10 == int(digits[12])


def is_thai_id(digits: str) -> bool:
    """Check a Thai identification number: first digit 1 to 8, check digit with weights 13 to 2 modulo 11."""
    if len(digits) != 13 or digits[0] not in "12345678":
        return False
    total = sum(int(d) * (13 - place) for place, d in enumerate(digits[:12]))
    return (11 - total % 11) % 10 == int(digits[12])


def is_iban(text: str) -> bool:
    """Check an IBAN: its country's length, and remainder 1 modulo 97 (ISO 13616)."""
    if IBAN_CHARS.get(text[:2]) != len(text) or not text.isalnum() or not text.isascii():
        return False
    # The first four characters move to the end; letters become 10 to 35.
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def find_emails(text: str, language: str) -> Iterator[Span]:
    if "@" in text:
        for m in _EMAIL.finditer(text):
            if not (_NO_DOMAIN.search(m.group().rpartition("@")[2]) or ".." in m.group()
                    or _PASSWORD_BEFORE.search(text, max(m.start() - 100, 0), m.start())):
                yield m.span()


def find_ip_addresses(text: str, language: str) -> Iterator[Span]:
    """Yield public IP addresses, without private and documentation ranges and version numbers."""
    for pattern in (_IP4, _IP6):
        for m in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(m.group())
            except ValueError:
                continue
            if not address.is_global or address.is_multicast or _VERSION_BEFORE.search(
                    text, max(m.start() - 20, 0), m.start()):
                continue
            if address.version == 6 or len(m.group()) >= _MIN_IP4_CHARS:
                yield m.span()


def _find_checked(text: str, pattern: re.Pattern[str], check: Callable[[str], bool], bare: bool
                  ) -> Iterator[Span]:
    for m in pattern.finditer(text):
        written = m.group()
        if (bare or not written.isdigit()) and check(re.sub(r"\D", "", written)):
            yield m.span()


def find_cards(text: str, language: str) -> Iterator[Span]:
    yield from _find_checked(text, _CARD, is_card, bare=True)


def find_korean_rrns(text: str, language: str) -> Iterator[Span]:
    """Yield Korean resident registration numbers; bare digits only in Korean text."""
    yield from _find_checked(text, _RRN, is_korean_rrn, bare=language == "ko")


def find_thai_ids(text: str, language: str) -> Iterator[Span]:
    """Yield Thai identification numbers; bare digits only in Thai text."""
    yield from _find_checked(text, _THAI_ID, is_thai_id, bare=language == "th")


def find_ibans(text: str, language: str) -> Iterator[Span]:
    for m in _IBAN.finditer(text):
        # The pattern may reach into the following words: the country's length marks the end.
        places = [place for place in range(*m.span(1)) if text[place] != " "]
        size = IBAN_CHARS.get(text[m.start():m.start() + 2], len(places) + 1)
        if size > len(places):
            continue
        stop = places[size - 1] + 1
        is_whole = not re.match(r"\w", text[stop:stop + 1], re.ASCII)
        if is_whole and is_iban(text[m.start():stop].replace(" ", "")):
            yield m.start(), stop


def find_api_keys(text: str, language: str) -> Iterator[Span]:
    yield from (m.span() for m in _API_KEY.finditer(text))


FINDERS: dict[str, Callable[[str, str], Iterator[Span]]] = {
    "api_key": find_api_keys, "email": find_emails, "iban": find_ibans, "korean_rrn": find_korean_rrns,
    "thai_id": find_thai_ids, "card": find_cards, "ip": find_ip_addresses, "phone": find_phones}
"""Kind -> finder for a text and its language; if spans overlap, the earlier kind wins."""


def _find_other_braces(placeholder: str) -> Violation | None:
    if set(placeholder.replace(NAME, "")) & set("{}"):
        return ProblemCode.BOUND, f"must have no braces but {NAME}", ""
    return None


@dataclass(frozen=True)
class PiiSettings:
    """Settings for `pii`."""

    mask: Annotated[tuple[Finder, ...], MinLen(1)] = tuple(FINDERS)
    """Kinds to mask: api_key, email, iban, korean_rrn, thai_id, card, ip, phone."""
    mask_in_code: tuple[Finder, ...] = ("api_key", "email")
    """Kinds to mask also in code and markup, where a masked number would break a program."""
    placeholder: Annotated[str, Bound(_find_other_braces)] = "[{name}]"
    """Replacement text; {name}: the kind in the document's language."""
    names_in: Annotated[str, choice_from(lambda: ("", *load_masked_names()["email"]))] = ""
    """Language for the names; "": the document's language, or English without names in it."""


@lru_cache(maxsize=1)
def load_masked_names() -> dict[str, dict[str, str]]:
    """Return kind -> language -> name for placeholders."""
    names: dict[str, dict[str, str]] = load_package_table(NAMES_FILE)
    return names


class Pii(Step):
    """Masks personal data; the column `pii` counts masked spans by kind."""

    kind = "pii"
    added_columns = {"pii": "string"}
    Settings = PiiSettings
    settings: PiiSettings

    def list_libraries(self) -> Sequence[str]:
        return ("phonenumbers",) if "phone" in self.settings.mask else ()

    def list_files(self) -> Sequence[Path]:
        return [NAMES_FILE]

    def judge_document(self, document: Doc) -> StepOutcome:
        language = document.columns.get("language") or ""
        in_prose = (document.columns.get("form") or "prose") == "prose"
        kinds = [kind for kind in FINDERS
                 if kind in self.settings.mask and (in_prose or kind in self.settings.mask_in_code)]
        spans = find_personal_data(document.text, language, kinds)
        if not spans:
            return StepOutcome(values={"pii": ""})
        counts = Counter(kind for _, _, kind in spans)
        summary = " ".join(f"{kind}={counts[kind]}" for kind in kinds if counts[kind])
        text = self._mask_spans(document.text, spans, self.settings.names_in or language)
        return StepOutcome(text=text, values={"pii": summary})

    def _mask_spans(self, text: str, spans: list[tuple[int, int, str]], language: str) -> str:
        parts, end = [], 0
        for start, stop, kind in spans:
            names = load_masked_names()[kind]
            name = names.get(language, names["en"])
            parts += [text[end:start], self.settings.placeholder.replace(NAME, name)]
            end = stop
        return "".join([*parts, text[end:]])


def find_personal_data(text: str, language: str, kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return spans as (start, stop, kind), sorted; if spans overlap, the earlier kind in `kinds` wins."""
    taken: list[tuple[int, int, str]] = []
    for kind in kinds:
        for start, stop in FINDERS[kind](text, language):
            # `taken` stays sorted and without overlaps: insert a span only if it fits between its neighbours.
            place = bisect_left(taken, (start,))
            fits_left = place == 0 or taken[place - 1][1] <= start
            fits_right = place == len(taken) or taken[place][0] >= stop
            if fits_left and fits_right:
                taken.insert(place, (start, stop, kind))
    return taken
