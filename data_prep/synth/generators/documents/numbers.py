"""Numbers that a text states, as values: 1,200,000, 1.2 million and 120만 are one number.

What is written in digits is `stated`; what stands in words, or in the name of a month, is known beside it, so
that "three ships" of a source supports the "3" of a text made from it, and "March 5" the "3월 5일" of its
translation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from data_prep.synth.generators.documents.languages import Customs, customs_of
from megatron_sov.base.documents.scripts import OF_RUNS, in_brackets

SMALL = 10
"""Words for numbers up to this say other things too, as "one" and "second" do."""
MAX_DIGITS = 40
"""A longer run of digits is compared as it stands and not as a value."""
_SIGNS = str.maketrans({"，": ",", "．": ".", "\u00a0": "'", "\u202f": "'", "\u2009": "'", "’": "'"})
_DIGITS = re.compile(r"(?<![A-Za-z_\d])\d+(?:[.,']\d+)*")
_WITH_THOUSANDS = {False: re.compile(r"\d{1,3}([,'])\d{3}(?:\1\d{3})*(?:\.\d+)?"),
                   True: re.compile(r"\d{1,3}([.'])\d{3}(?:\1\d{3})*(?:,\d+)?")}
_SET_APART = re.compile(r"(?<![\d.,'])\d{1,3}(?: \d{3})+(?!\d)")
"""Thousands set apart by blanks, as where a comma is the decimal sign."""
_SHORT_MONTH_CHARS = 3
_SIGN = re.compile(r"[^\w\s'-]+|\n")
"""Ends a number in words."""
_UNSPACED = re.compile(f"[{in_brackets(OF_RUNS)}]")


@dataclass(frozen=True)
class Numbers:
    """Numbers of a text; each as its value in lowest terms."""

    stated: frozenset[str]
    """In digits."""
    told: frozenset[str]
    """In words, by the name of a month, or as a part of a number such as 3만 5천."""
    worded: frozenset[str] = frozenset()
    """Of those in words the ones that are plainly meant as numbers: above `SMALL`, in Latin letters."""

    @property
    def known(self) -> frozenset[str]:
        return self.stated | self.told


@dataclass(frozen=True)
class _NumberPart:
    """Digits with the words that multiply them."""

    begin: int
    end: int
    value: Fraction
    factor: int


def numbers_of(text: str, language: str = "en") -> Numbers:
    """Return the numbers of a text; digits that hang on Latin letters (B52) belong to a name."""
    customs = customs_of(language)
    plain = _ascii_digits(text, customs)
    stated: set[str] = set()
    counted = {value for part in _SIGN.split(text.casefold())
               for value in _counted(re.findall(r"[^\W_]+", part), customs)}
    told = _values_in_words(text, customs) | set(map(str, counted))
    # Parts such as 3만 and 5천 add up to one number; each is known as well. None closes the last run.
    run: list[_NumberPart] = []
    for part in [*_parts(plain, customs, stated), None]:
        if run and (part is None or not _goes_on(plain, run[-1], part, customs)):
            stated.add(str(sum(p.value for p in run)))
            told |= {str(p.value) for p in run}
            run = []
        if part is not None:
            run.append(part)
    worded = {str(value) for value in counted if value > SMALL}
    return Numbers(frozenset(stated), frozenset(told), frozenset(worded))


def _ascii_digits(text: str, customs: Customs) -> str:
    """Return a text with the digits of all scripts as ASCII's, and no blanks inside numbers."""
    if not text.isascii():
        # digits of Thai, Arabic or full width have the values of ASCII's
        text = "".join(str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in text)
    text = text.translate(_SIGNS)
    return _SET_APART.sub(lambda match: match[0].replace(" ", "'"), text) if customs.decimal_comma else text


def _parts(text: str, customs: Customs, apart: set[str]) -> Iterator[_NumberPart]:
    """Yield the numbers of a text with what multiplies them; what is no value goes to `apart`."""
    units = {**customs.glued, **customs.multipliers}
    behind = _multipliers(tuple(customs.glued), tuple(customs.multipliers))
    for match in _DIGITS.finditer(text):
        *before, last = _values(match[0], customs.decimal_comma)
        apart.update(before)
        # as it stands: converting thousands of digits is slow, and Python refuses it
        if len(last) > MAX_DIGITS:
            apart.add(last)
            continue
        end, factor = match.end(), 1
        # an article of a law (제5조) is no five trillion
        while not (text[match.start() - 1:match.start()] == "제" and text[end:end + 1] == "조") and (
                word := behind.match(text, end)):
            factor *= units[(word[1] or word[2]).lower()]
            end = word.end()
        yield _NumberPart(match.start(), end, Fraction(last) * factor, factor)


@lru_cache(maxsize=64)
def _multipliers(glued: tuple[str, ...], spaced: tuple[str, ...]) -> re.Pattern[str]:
    never = r"(?!)"
    return re.compile(rf"\s?({_any_of(glued) or never})(?!각|큼)"
                      rf"|[\s'-]{{0,2}}({_any_of(spaced) or never})(?![^\W\d_])", re.IGNORECASE)


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))


def _goes_on(text: str, part: _NumberPart, after: _NumberPart, customs: Customs) -> bool:
    """Return whether the number that follows is the rest of this one, as 5천 is of 3만 5천."""
    return (bool(customs.glued) and part.factor > 1 and text[part.end:after.begin] in ("", " ")
            and after.value < part.factor)


def _values(digits: str, decimal_comma: bool) -> list[str]:
    """Return the value of digits with signs between them; of a date or a list such as 1,2,3 each part's."""
    point = "," if decimal_comma else "."
    if _WITH_THOUSANDS[decimal_comma].fullmatch(digits):
        whole, _, rest = digits.partition(point)
        return [_value(re.sub(r"\D", "", whole), rest)]
    if re.fullmatch(rf"\d+(?:\{point}\d+)?", digits):
        whole, _, rest = digits.partition(point)
        return [_value(whole, rest)]
    return [_value(part, "") for part in re.split(r"\D", digits)]


def _value(whole: str, rest: str) -> str:
    if len(whole) + len(rest) > MAX_DIGITS:
        return f"{whole}.{rest}"
    # exact: 0.10 and 0.1 are one value, which floats would not promise
    return str(Fraction(f"{whole}.{rest or '0'}"))


def _counted(words: Iterable[str], customs: Customs) -> Iterator[int]:
    """Yield the numbers that words in Latin letters make together, such as two hundred and five thousand."""
    whole, part = 0, 0
    for word in [*words, ""]:
        value = customs.words.get(word, 0) if word.isascii() else 0
        factor = customs.multipliers.get(word, 0) if whole or part else 0
        # a word goes on only after full hundreds, or a unit after tens: "two three" are two numbers
        if value and (part % 100 == 0 or (20 <= part % 100 <= 90 and part % 10 == 0 and value < 10)):
            part += value
        elif factor == 100:
            part *= factor
        elif factor:
            whole, part = whole + part * factor, 0
        elif word != "and" or not (whole or part >= 100):
            if whole or part:
                yield whole + part
            whole, part = 0, value


def _values_in_words(text: str, customs: Customs) -> set[str]:
    """Return the values of words for numbers and of months."""
    folded = text.casefold()
    words = re.findall(r"[^\W\d_]+", folded)
    present = set(words)
    months = [*zip(customs.months, range(1, 13), strict=False)]
    # Mar. for March
    months += [(name[:_SHORT_MONTH_CHARS], month) for name, month in months if name.isascii()]
    # scripts without blanks have no words to look up, so the name may be anywhere
    told = {str(value) for name, value in [*customs.words.items(), *months]
            if (name in folded if _UNSPACED.search(name) else name in present)}
    for one, other in pairwise(words):  # twenty-five
        tens, ones = customs.words.get(one, 0), customs.words.get(other, 0)
        if 20 <= tens <= 90 and 0 < ones < 10:
            told.add(str(tens + ones))
    return told
