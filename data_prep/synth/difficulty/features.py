"""What an estimator of difficulty sees of a problem: its words and characters, as scorers do, and figures of
its form: lengths, numbers, signs, scripts."""

from __future__ import annotations

import math
import re

import numpy as np

from data_prep.curate.scoring.ngrams import Ngrams
from megatron_sov.base.documents.scripts import letters_by_script

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OPERATOR = re.compile(r"[-+*/^=<>×÷·≤≥≠∫∑√±%]|\\(?:frac|sqrt|int|sum|prod|lim|cdot|times|le|ge|ne)\b")
_SENTENCE = re.compile(r"[.?!。？！]+(?:\s|$)|\n+")
_POWER = re.compile(r"[\^²³⁴⁵⁶⁷⁸⁹]")
MAX_DIGITS = 30
"""Of a number: more are as many."""
SCRIPTS = ("LATIN", "HANGUL", "CJK", "HIRAGANA", "KATAKANA", "THAI", "CYRILLIC", "ARABIC", "DEVANAGARI")
NAMES = ("chars", "units", "different_units", "sentences", "numbers", "different_numbers", "digits",
         "longest_number", "largest_number", "second_number", "decimals", "operators", "different_operators",
         "powers", "commands", "brackets", "lines", "questions", "numbers_by_digits",
         *(script.lower() for script in SCRIPTS))
"""Figures of the form, in order."""


def form(text: str, ngrams: Ngrams) -> np.ndarray:
    """Return the figures of a problem's form, float64, in the order of `NAMES`; counts as ln(1 + count)."""
    text = text[: ngrams.settings.max_chars]
    units = ngrams.units(text)
    numbers = [number.replace(",", "") for number in _NUMBER.findall(text)]
    sizes = sorted((_size(number) for number in numbers), reverse=True)
    lengths = [min(sum(map(str.isdigit, number)), MAX_DIGITS) for number in numbers]
    operators = _OPERATOR.findall(text)
    letters = letters_by_script(text)
    num_letters = max(1, sum(letters.values()))
    counts = [len(text), len(units), len(set(units)), len(_SENTENCE.findall(text)), len(numbers),
              len(set(numbers)), sum(lengths), max(lengths, default=0)]
    more = [sum("." in number for number in numbers), len(operators), len(set(operators)),
            len(_POWER.findall(text)), len(_COMMAND.findall(text)), sum(map(text.count, "([{")),
            text.count("\n"), sum(map(text.count, "?？"))]
    return np.array([*map(math.log1p, counts), *[*sizes, 0.0, 0.0][:2], *map(math.log1p, more),
                     math.log1p(len(numbers) * max(lengths, default=0)),
                     *(letters[script] / num_letters for script in SCRIPTS)], np.float64)


def _size(number: str) -> float:
    """Return the decimal logarithm of 1 + a number."""
    whole, _, part = number.partition(".")
    whole = whole.lstrip("0")
    if len(whole) > MAX_DIGITS:
        return float(MAX_DIGITS)
    return math.log10(1 + float(f"{whole or 0}.{part.replace('.', '')[:MAX_DIGITS] or 0}"))
