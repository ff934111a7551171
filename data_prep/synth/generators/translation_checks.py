"""What a translation has to keep of its source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.synth.generators.documents.answers import stands_in
from data_prep.synth.generators.documents.facts import quotes_of
from data_prep.synth.generators.documents.languages import in_language
from data_prep.synth.generators.documents.likeness import copied_share
from data_prep.synth.generators.documents.numbers import numbers_of
from data_prep.synth.generators.documents.verdicts import within
from data_prep.synth.sample import Verdict
from megatron_sov.documents.overlap import fold
from megatron_sov.errors import UserError

KEPT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`"  # code
    r"|\$\$[^$]{1,2000}\$\$|\$(?!\s)[^$\n]{1,300}(?<!\s)\$(?!\d)"  # formulas
    r"|\\\([^\\]{1,300}\\\)|\\\[[^\]]{1,2000}\\\]"
    r"|\b(?:https?://|www\.)(?:[^\s<>()\"'）」』，。、]*[\w/#=&%-])"  # addresses
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w"
    r"|\{\{[^{}\n]{1,80}\}\}|\$?\{[^{}\n]{0,80}\}|%(?:\(\w+\))?[-+0#]?\d*(?:\.\d+)?[sdfrx]\b|<<[^<>\n]{1,80}>>"
    r"|</?[A-Za-z][^<>\n]{0,200}>|\[[A-Z][A-Z_ ]*\]", re.DOTALL)
"""What stands in no language: code, formulas, addresses, placeholders, tags."""
COPIED_WORDS = 4
"""Runs of so many words that stand in the source too were not translated."""
MAX_GLOSSARY_BYTES = 1 << 20
_MAX_TOLD = 3


def read_glossary(file: Path) -> list[tuple[str, str]]:
    """Return terms with their translations: a line each, a tab between; lines that begin with # are notes.

    Raises:
        UserError: the file cannot be read, or a line is none of these.
    """
    try:
        with open(file, "rb") as f:
            raw = f.read(MAX_GLOSSARY_BYTES + 1)
        if len(raw) > MAX_GLOSSARY_BYTES:
            raise UserError(f"glossary {file}: is longer than {MAX_GLOSSARY_BYTES >> 20} MiB; keep to terms")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"glossary {file}: is no text in UTF-8; pass lines of TERM<tab>TRANSLATION") from None
    except OSError as e:
        raise UserError(f"glossary {file}: cannot be read ({e.strerror or e}); check the path") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        term, _, translation = (part.strip() for part in line.partition("\t"))
        if not (term and translation):
            raise UserError(f"glossary {file}:{number}: is no TERM<tab>TRANSLATION; set a tab between both")
        if found.setdefault(term, translation) != translation:
            raise UserError(f"glossary {file}:{number}: translates {term!r} again, as something else; "
                            "keep one of the lines")
    return list(found.items())


def kept_verdicts(made: str, source: str, language: str, source_language: str, keep_quotes: bool
                  ) -> Iterator[Verdict]:
    """Yield whether code, addresses, placeholders, numbers and quotations came through."""
    before, after = Counter(KEPT.findall(source)), Counter(KEPT.findall(made))
    yield Verdict("code and placeholders", before == after, _told(before - after, after - before))
    if keep_quotes:
        lost = [quote for quote in quotes_of(KEPT.sub(" ", source)) if quote not in made]
        yield Verdict("quotes", not lost, ", ".join(quote[:60] for quote in lost[:_MAX_TOLD]))
    numbers = numbers_of(KEPT.sub(" ", source), source_language)
    others = numbers_of(KEPT.sub(" ", made), language)
    yield Verdict("numbers", numbers.stated <= others.known and others.stated <= numbers.known,
                  _told(numbers.stated - others.known, others.stated - numbers.known))


def translated_verdicts(made: str, source: str, language: str, keep_quotes: bool, max_untranslated: float
                        ) -> Iterator[Verdict]:
    """Yield whether a translation is in its language, and nothing was left as it was."""
    text, original = (KEPT.sub(" ", part) for part in (made, source))
    if keep_quotes:
        for quote in sorted(quotes_of(original), key=len, reverse=True):
            text, original = text.replace(quote, " "), original.replace(quote, " ")
    yield in_language(text, language)
    is_same = " ".join(text.split()) == " ".join(original.split()) and any(c.isalpha() for c in original)
    untranslated = 1.0 if is_same else copied_share(text, original, COPIED_WORDS)
    yield within("untranslated", untranslated, 0, max_untranslated)


def glossary_verdict(made: str, source: str, glossary: Sequence[tuple[str, str]]) -> Verdict:
    """Return whether the terms that stand in a source are translated as the glossary says."""
    text = " ".join(fold(made).split())
    missed = [term for term, translation in terms_in(source, glossary)
              if " ".join(fold(translation).split()) not in text]
    return Verdict("glossary", not missed, "translated otherwise: " + ", ".join(missed[:_MAX_TOLD])
                   if missed else "")


def terms_in(source: str, glossary: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the entries of a glossary whose terms stand in a text."""
    return [entry for entry in glossary if stands_in(entry[0], source)]


def _told(lost: Counter[str] | frozenset[str], new: Counter[str] | frozenset[str]) -> str:
    return "; ".join(f"{what}: {', '.join(part[:60] for part in sorted(parts)[:_MAX_TOLD])}"
                     for what, parts in (("lost", lost), ("new", new)) if parts)
