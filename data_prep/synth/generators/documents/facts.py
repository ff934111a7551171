"""What a text states that a text made from it may not change: numbers, names, quoted strings.

Names are seen where writing marks them: a capital letter inside a sentence, capitals inside a word, and Latin
words in a text of another script.  Other names, and what is said of all of them, only a judge can compare.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.generators.documents.languages import customs_of
from data_prep.synth.generators.documents.numbers import Numbers, numbers_of
from megatron_sov.base.documents.overlap import fold
from megatron_sov.base.documents.scripts import LANGUAGES

_QUOTES = re.compile("|".join(rf"{opening}([^{opening}{closing}\n]{{1,300}}){closing}" for opening, closing in
                              ("“”", "「」", "『』", "《》", "〈〉", "«»", "„“")) + r'|"([^"\n]{1,300})"')
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|[-'’](?=[^\W_]))*")
_LATIN_WORD = re.compile(r"[A-Za-z](?:[A-Za-z0-9]|[-'’](?=[A-Za-z0-9]))+")
_HEADING_WORDS = 12
_ENDINGS = ("", "s", "n", "an", "ian", "ese", "ish", "i", "y", "ic", "es", "a", "e", "ans", "ians")
"""What hangs on the stem of a name: Korea, Korean; Italy, Italian."""
_MIN_STEM = 4
_POSSESSIVE = re.compile(r"['’]s?$")
MIN_FACTS = 3
"""With fewer numbers and names in a source their share says nothing."""
MAX_TOLD = 5
"""Facts that a verdict names."""


@dataclass(frozen=True)
class DocumentFacts:
    """Of one text."""

    numbers: Numbers
    """As values."""
    names: frozenset[str]
    """Words, as they are written."""
    quotes: frozenset[str]
    """Without their marks."""


def facts_of(text: str, language: str) -> DocumentFacts:
    return DocumentFacts(numbers_of(text, language), frozenset(names_of(text, language)),
                         frozenset(quotes_of(text)))


def quotes_of(text: str) -> list[str]:
    """Return what stands between marks of quotation, in order."""
    inside = [next(filter(None, match.groups())).strip() for match in _QUOTES.finditer(text)]
    return [quote for quote in inside if quote]


def names_of(text: str, language: str) -> list[str]:
    """Return the words that are seen to be names, in order."""
    customs = customs_of(language)
    if not customs.has_case:
        # in a text of another script each Latin word may be a name
        is_latin = "LATIN" in LANGUAGES.get(language, ())  # where every noun has a capital, none tells a name
        return [] if is_latin else [_POSSESSIVE.sub("", word) for word in _LATIN_WORD.findall(text)]
    found: list[str] = []
    for line in text.split("\n"):
        words = list(_WORD.finditer(line))
        if not _is_heading(line, [match[0] for match in words]):
            bare = [(match.start(), _POSSESSIVE.sub("", match[0])) for match in words]
            found += [word for start, word in bare
                      if word.lower() not in customs.titles and _is_name(line, start, word)]
    return found


def _is_heading(line: str, words: list[str]) -> bool:
    """Return whether a line is a title, in which every word may have a capital."""
    capitals = sum(word[0].isupper() for word in words)
    return (len(words) <= _HEADING_WORDS and capitals * 2 > len(words)
            and not line.rstrip().endswith((".", "!", "?", "。", ":", ";", ",", '"', "”")))


def _is_name(line: str, start: int, word: str) -> bool:
    # the pronoun has a capital and is no name
    if word == "I" or not any(c.isupper() for c in word):
        return False
    if len(word) > 1 and any(c.isupper() for c in word[1:].replace("-", "")):
        # capitals inside mark a name anywhere (UNESCO); anti-American has one and is none
        return "-" not in word or word[0].isupper()
    before = line[:start].rstrip()
    # a capital that begins a sentence says nothing
    begins = not before or before[-1] in ".!?:;…。！？\"“”'‘’«»„([{*#>|-–—•0123456789)"
    return word[0].isupper() and not begins


def unsupported(made: DocumentFacts, source: str, source_facts: DocumentFacts, *,
                compare_names: bool = True) -> DocumentFacts:
    """Return what a text states that its source does not.

    Args:
        made: facts of the text.
        source: the text that it was made from.
        source_facts: its facts.
        compare_names: without: they are written in another script there.
    """
    # in one language alone: in another script a name is written in other letters
    words = _words(source)
    names = {name for name in made.names if compare_names and not _stands_among(name, words)}
    # blanks and line ends are not part of a quotation
    flat = _flat(source)
    quotes = {quote for quote in made.quotes if compare_names and _flat(quote).strip(".,!?… ") not in flat}
    # in another language words make numbers in ways that nothing here knows
    said = made.numbers.stated | (made.numbers.worded if compare_names else frozenset())
    return DocumentFacts(Numbers(said - source_facts.numbers.known, frozenset()), frozenset(names),
                         frozenset(quotes))


def _words(text: str) -> set[str]:
    """Return the words of a text, those in Latin letters apart from what hangs on them."""
    folded = fold(text)
    # both forms: in a word such as SOV모델 the Latin part is a name of its own
    words = {_POSSESSIVE.sub("", word) for word in (*_WORD.findall(folded), *_LATIN_WORD.findall(folded))}
    return words | {part for word in words for part in word.split("-")}


def _stands_among(name: str, words: set[str]) -> bool:
    folded = fold(name)
    parts = [folded] if folded in words else folded.split("-")
    return all(part in words or any(_same_stem(part, word) for word in words) for part in parts if part)


def _same_stem(one: str, other: str) -> bool:
    """Return whether two words differ in the ending of a name alone."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    # any cut after the fourth shared letter is enough: Kore-a and Kore-an
    return any(one[at:] in _ENDINGS and other[at:] in _ENDINGS for at in range(_MIN_STEM, shared + 1))


def _flat(text: str) -> str:
    return " ".join(fold(text).split())


def fact_verdicts(made: str, source: str, language: str, source_language: str) -> list[SampleVerdict]:
    """Return whether all numbers, names and quoted strings of a text stand in the one that it was made from.

    Of a text in another language names and quotes are not compared, which are written otherwise there.
    """
    facts = unsupported(facts_of(made, language), source, facts_of(source, source_language),
                        compare_names=language == source_language)
    return [SampleVerdict(check, not found, _list_missing(found)) for check, found in (
        ("numbers", facts.numbers.stated), ("names", facts.names), ("quotes", facts.quotes))]


def kept_share(made: str, source: str, language: str, source_language: str) -> float | None:
    """Return the share of a source's numbers and names that a text made from it has; None: it has too few."""
    facts = facts_of(source, source_language)
    made_facts = numbers_of(made, language).known
    # numbers in words count as kept, as 3 does where the text says three
    kept = [number in made_facts for number in facts.numbers.stated]
    if language == source_language:
        words = _words(made)
        kept += [_stands_among(name, words) for name in facts.names if not name.islower()]
    return sum(kept) / len(kept) if len(kept) >= MIN_FACTS else None


def _list_missing(found: frozenset[str]) -> str:
    told = ", ".join(name[:60] for name in sorted(found)[:MAX_TOLD])
    return f"not in the source: {told}" if found else ""
