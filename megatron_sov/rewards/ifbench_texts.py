"""Sentences, words and marks as the checks of IFBench see them.

IFBench cuts sentences by NLTK's punkt, a trained model, and words by NLTK's rules for English; here both are
cut by few rules.
"""

from __future__ import annotations

import re
import string
import unicodedata

from megatron_sov.rewards.instruction_checks import hold_periods, release_periods
from megatron_sov.rewards.patterns import regex

PUNCTUATION = string.punctuation
_NO_PUNCTUATION = str.maketrans("", "", PUNCTUATION)
# behind an ellipsis a sentence goes on, unless a capital letter begins another one
_SENTENCE_END = regex.compile(
    r"(?:(?<=[?!][\"”'’)\]*]*)|(?<=(?<!\.\.)\.[\"”'’)\]*]*)|(?<=\.\.\.)(?=\s+[A-Z]))\s+")
_CHUNK = re.compile(r"\.\.\.|--+|\w+(?:[-./'&_]\w+|[,:]\d+)*|[^\w\s]")
_CONTRACTION = re.compile(r"(\w+)(n't|'(?:s|m|d|ll|re|ve))", re.IGNORECASE)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text with the marks that end them."""
    return [release_periods(part) for part in _SENTENCE_END.split(hold_periods(text.strip())) if part]


def tokens(text: str) -> list[str]:
    """Return the words of a text, each mark alone; of contractions the two parts."""
    found = []
    for chunk in _CHUNK.findall(text):
        match = _CONTRACTION.fullmatch(chunk)
        found += [match[1], match[2]] if match else [chunk]
    return found


def bare(text: str) -> str:
    """Return a text without ASCII punctuation."""
    return text.translate(_NO_PUNCTUATION)


def trimmed(text: str) -> str:
    """Return a text without punctuation and blanks at its ends."""
    return text.strip(PUNCTUATION + " ")


def ascii_of(text: str) -> str:
    """Return a text in ASCII: letters without their marks, and nothing of other scripts."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
