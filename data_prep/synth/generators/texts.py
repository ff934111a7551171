"""Functions over texts for generator files: language, numbers, quotations, code, and how much texts share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml

from data_prep.curate.quality.identify import (
    KNOWN_LANGUAGES, UNKNOWN_LANGUAGE, detect_form, extract_language_text, identify_language)
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.base.documents.scripts import LANGUAGES, count_letters_by_script
from megatron_sov.base.settings import choice_from
from megatron_sov.judge.rewards.surface import LanguageReward

LANGUAGE_NAMES = Path(__file__).with_name("languages.yaml")
MIN_SCORE = 0.5
"""Below this score of `identify` the language of a text is not sure."""
MIN_LETTERS = 80
"""Letters of a text from which on `identify` tells languages of one script apart."""
MAX_FOREIGN_SHARE = 0.1
"""Of letters that are neither the language's nor Latin."""
# up to 40 % of the letters may be Latin: terms and names, which every language borrows
_SCRIPTS = LanguageReward(also=("en",), max_also_share=0.4, min_share=0.4)
_QUOTATION = re.compile("|".join(
    rf"{opening}([^{opening}{closing}\n]{{1,300}}){closing}" for opening, closing in
    ("“”", "「」", "『』", "《》", "〈〉", "«»", "„“"))
    + r'|"([^"\n]{1,300})"|`([^`\n]{1,300})`|<<([^<>\n]{1,300})>>')
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`"  # code
    r"|\$\$[^$]{1,2000}\$\$|\$(?!\s)[^$\n]{1,300}(?<!\s)\$(?!\d)"  # formulas
    r"|\\\([^\\]{1,300}\\\)|\\\[[^\]]{1,2000}\\\]"
    r"|\b(?:https?://|www\.)(?:[^\s<>()\"'）」』，。、]*[\w/#=&%-])"  # addresses
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w"
    r"|\{\{[^{}\n]{1,80}\}\}|\$?\{[^{}\n]{0,80}\}|%(?:\(\w+\))?[-+0#]?\d*(?:\.\d+)?[sdfrx]\b|<<[^<>\n]{1,80}>>"
    r"|</?[A-Za-z][^<>\n]{0,200}>|\[[A-Z][A-Z_ ]*\]", re.DOTALL)
"""Parts of a text in no language: code, formulas, addresses, placeholders, tags."""
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?:[.,'’]\d+|[십백천만억조十百千万萬億亿兆]+\s?\d+)*")
"""Digits that hang on Latin letters, as in B52, belong to a name; 3만 5천 is one number."""
MIN_DIGITS = 3
"""Numbers with fewer significant digits may be words in another text: 3 and three, 5 and May."""
LanguageCode = Annotated[str, choice_from(lambda: LANGUAGES)]
"""A language whose script is known, as an ISO 639-1 code."""
ToldApart = Annotated[str, choice_from(lambda: {"", *set(LANGUAGES) & KNOWN_LANGUAGES})]
"""A language that texts are found to be in, as an ISO 639-1 code, or none."""


@lru_cache(maxsize=1)
def _names() -> Mapping[str, str]:
    names: dict[str, str] = yaml.safe_load(LANGUAGE_NAMES.read_text(encoding="utf-8"))
    return names


def language_name(language: str) -> str:
    """Return what a prompt calls a language."""
    return _names().get(language, f"the language with the ISO 639 code {language}")


def language_of(text: str) -> str:
    """Return the likeliest language of a text as an ISO 639-1 code."""
    return identify_language(text)[0]


def sure_language(document: str) -> str:
    """Return the language of a document; empty where it is not sure, or its script is not known."""
    language, score = identify_language(extract_language_text(document, detect_form(document)))
    return language if score >= MIN_SCORE and language != UNKNOWN_LANGUAGE and language in LANGUAGES else ""


def in_language(text: str, language: str) -> bool:
    """Return whether a text is in a language; names and terms in Latin letters may stand in it.

    A short text is judged by its letters alone, which do not tell languages apart that share a script.
    """
    script = _SCRIPTS.score({"response": text, "language": language})
    if not script.components.get("num_letters", 1):
        return True
    if script.reward == 0 or script.components["foreign_share"] > MAX_FOREIGN_SHARE:
        return False
    found, score = identify_language(text)
    is_long = sum(count_letters_by_script(text).values()) >= MIN_LETTERS
    return not is_long or found in (language, UNKNOWN_LANGUAGE) or score < MIN_SCORE


def numbers_in(text: str) -> list[str]:
    """Return the significant digits of the numbers of a text, each once: 12 for 1,200,000, 1.2 million and
    120만."""
    # digits of Thai, Arabic or full width have the values of ASCII's
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    digits = (re.sub(r"\D", "", number).strip("0") for number in _NUMBER.findall(plain))
    return list(dict.fromkeys(filter(None, digits)))


def changed_numbers(made: str, source: str, *, may_drop: bool = False) -> list[str]:
    """Return the numbers that a text made from a source has and its source lacks, or the other way round.

    A number of one or two significant digits may be a word on one side; it has changed where both sides have
    numbers that the other one lacks.

    Args:
        made: the text.
        source: what it was made from.
        may_drop: whether numbers of the source may be missing in the text.
    """
    own, others = numbers_in(made), numbers_in(source)
    new = [number for number in own if number not in others]
    lost = [number for number in others if number not in own]
    listed = new if may_drop else [*new, *lost]
    return listed if new and lost else [number for number in listed if len(number) >= MIN_DIGITS]


def quotations(text: str) -> list[str]:
    """Return the texts between quotation marks, backquotes or double angle brackets, in order."""
    inside = (next(filter(None, match.groups())).strip(" .,!?…") for match in _QUOTATION.finditer(text))
    return [quotation for quotation in inside if quotation]


def code_in(text: str) -> list[str]:
    """Return code, formulas, addresses, placeholders and tags, sorted."""
    return sorted(_CODE.findall(text))


def prose_of(text: str, leave_out: Iterable[str] = ()) -> str:
    """Return a text without code, formulas, addresses, placeholders and tags, and without some quotations."""
    text = _CODE.sub(" ", text)
    # the longest first, since a quotation may be a part of another
    for quotation in sorted(leave_out, key=len, reverse=True):
        text = text.replace(quotation, " ")
    return text


def copied_share(made: str, source: str, words: int) -> float:
    """Return the share of a text's runs of so many words that stand in its source.  Of a shorter text it is
    1 where the source is the same text, else 0."""
    runs = find_units(made).runs(words)
    if len(runs):
        return float(np.isin(runs, find_units(source).runs(words)).mean())
    return float(made.split() == source.split() and any(c.isalpha() for c in made))


def size_ratio(made: str, source: str) -> float:
    """Return the number of a text's words for each word of its source."""
    return find_units(made).size / max(find_units(source).size, 1)


def with_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages with other contents; those without one keep theirs."""
    return [{**message, "content": text} for message, text in zip(messages, texts, strict=False)] + [
        dict(message) for message in messages[len(texts):]]


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf(text: str, reference: str) -> float:
    """Return the chrF of a text against a reference, 0 to 100."""
    return float(_chrf().sentence_score(text, [reference]).score)


def fill_phrasing(phrasing: str, **fields: str) -> str:
    """Put texts into the places {name} of a phrasing; a place inside of a text is nothing to fill in."""
    return re.sub(r"\{(\w+)\}", lambda place: fields.get(place[1], place[0]), phrasing)
