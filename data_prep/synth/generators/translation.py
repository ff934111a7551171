"""Checks of translations: code, numbers and quotations that have to come through, and the way back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.generators.documents.facts import quotes_of
from data_prep.synth.generators.documents.languages import in_language
from data_prep.synth.generators.documents.numbers import numbers_of
from data_prep.synth.generators.documents.verdicts import copied_share

KEPT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`"  # code
    r"|\$\$[^$]{1,2000}\$\$|\$(?!\s)[^$\n]{1,300}(?<!\s)\$(?!\d)"  # formulas
    r"|\\\([^\\]{1,300}\\\)|\\\[[^\]]{1,2000}\\\]"
    r"|\b(?:https?://|www\.)(?:[^\s<>()\"'）」』，。、]*[\w/#=&%-])"  # addresses
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w"
    r"|\{\{[^{}\n]{1,80}\}\}|\$?\{[^{}\n]{0,80}\}|%(?:\(\w+\))?[-+0#]?\d*(?:\.\d+)?[sdfrx]\b|<<[^<>\n]{1,80}>>"
    r"|</?[A-Za-z][^<>\n]{0,200}>|\[[A-Z][A-Z_ ]*\]", re.DOTALL)
"""Parts of a text in no language: code, formulas, addresses, placeholders, tags."""
COPIED_WORDS = 4
"""Runs of so many words that stand in the source too were not translated."""
MAX_UNTRANSLATED_SHARE = 0.1
"""Of a translation's runs of four words, those that may stand in the source."""
_MAX_TOLD = 3


def kept_in_translation(made: str, source: str, language: str, source_language: str, keep_quotes: bool
                        ) -> list[SampleVerdict]:
    """Return whether code, addresses, placeholders, numbers and quotations came through."""
    # counted: a formula that occurs twice has to occur twice
    before, after = Counter(KEPT.findall(source)), Counter(KEPT.findall(made))
    found = [SampleVerdict("code and placeholders", before == after,
                           _changes(before - after, after - before))]
    if keep_quotes:
        lost = [quote for quote in quotes_of(KEPT.sub(" ", source)) if quote not in made]
        found.append(SampleVerdict("quotes", not lost, ", ".join(quote[:60] for quote in lost[:_MAX_TOLD])))
    # digits of one side may be words of the other, so they are looked up among all that it has
    numbers = numbers_of(KEPT.sub(" ", source), source_language)
    others = numbers_of(KEPT.sub(" ", made), language)
    return [*found, SampleVerdict("numbers",
                                  numbers.stated <= others.known and others.stated <= numbers.known,
                                  _changes(numbers.stated - others.known, others.stated - numbers.known))]


def translated_verdicts(made: str, source: str, language: str, keep_quotes: bool) -> list[SampleVerdict]:
    """Return whether a translation is in its language, and nothing was left as it was."""
    text, original = (KEPT.sub(" ", part) for part in (made, source))
    if keep_quotes:
        # the longest first, since a quote may be a part of another
        for quote in sorted(quotes_of(original), key=len, reverse=True):
            text, original = text.replace(quote, " "), original.replace(quote, " ")
    # a short text has no runs of words, and would count as translated
    is_same = " ".join(text.split()) == " ".join(original.split()) and any(c.isalpha() for c in original)
    share = 1.0 if is_same else copied_share(text, original, COPIED_WORDS)
    return [in_language(text, language), SampleVerdict("untranslated", share <= MAX_UNTRANSLATED_SHARE,
                                                       f"{share:.2f}, at most {MAX_UNTRANSLATED_SHARE:g}")]


def _changes(lost: Counter[str] | frozenset[str], new: Counter[str] | frozenset[str]) -> str:
    return "; ".join(f"{what}: {', '.join(part[:60] for part in sorted(parts)[:_MAX_TOLD])}"
                     for what, parts in (("lost", lost), ("new", new)) if parts)


def with_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages with other contents; those without one keep theirs."""
    return [{**message, "content": text} for message, text in zip(messages, texts, strict=False)] + [
        dict(message) for message in messages[len(texts):]]


@lru_cache(maxsize=1)
def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf(text: str, reference: str) -> float:
    """Return the chrF of a text against a reference, 0 to 100."""
    return float(_metric().sentence_score(text, [reference]).score)
