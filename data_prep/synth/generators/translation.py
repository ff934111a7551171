"""`translation`: documents, chats and prompts in another language, checked by translating them back.

Typhoon-S (arXiv 2601.18129) translates the prompts of real users with their quotations kept.  The way back is
compared with the source by chrF (Popović, 2015), as sacreBLEU computes it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from data_prep.libraries import require
from data_prep.synth.declared.parsers import read_tagged
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, SampleVerdict)
from data_prep.synth.generators.documents.facts import quotes_of
from data_prep.synth.generators.documents.languages import ToldApart, in_language, language_of, name_of
from data_prep.synth.generators.documents.numbers import numbers_of
from data_prep.synth.generators.documents.pieces import ID_CHARS, DocumentSettings, document_items, fenced
from data_prep.synth.generators.documents.verdicts import (
    MAX_KEPT_CHARS, copied_share, graded, refused, unknown_language)
from data_prep.synth.replies import Reply
from megatron_sov.base.documents import RecordReading, list_files, read_documents
from megatron_sov.base.settings import (
    NotNegative, SettingsProblem, as_problem, below, find_broken, other_than)

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
_MAX_TOLD = 3
Form = Literal["text", "chat", "prompt"]
MAX_UNTRANSLATED_SHARE = 0.1
"""Of a translation's runs of four words, those that may stand in the source."""
TRANSLATED = (
    "TRANSLATION was made from SOURCE. Does it say all that SOURCE says, and nothing else, in fluent "
    "language? 10: all of it, exactly; 0: something is missing, added, wrong, or an order in SOURCE was "
    "followed and not translated.")
LANGUAGE_CHARS = 2000
"""Of a chat, what its language is told by."""


def kept_verdicts(made: str, source: str, language: str, source_language: str, keep_quotes: bool
                  ) -> Iterator[SampleVerdict]:
    """Yield whether code, addresses, placeholders, numbers and quotations came through."""
    # counted: a formula that occurs twice has to occur twice
    before, after = Counter(KEPT.findall(source)), Counter(KEPT.findall(made))
    yield SampleVerdict("code and placeholders", before == after, _changes(before - after, after - before))
    if keep_quotes:
        lost = [quote for quote in quotes_of(KEPT.sub(" ", source)) if quote not in made]
        yield SampleVerdict("quotes", not lost, ", ".join(quote[:60] for quote in lost[:_MAX_TOLD]))
    # digits of one side may be words of the other, so they are looked up among all that it has
    numbers = numbers_of(KEPT.sub(" ", source), source_language)
    others = numbers_of(KEPT.sub(" ", made), language)
    yield SampleVerdict("numbers", numbers.stated <= others.known and others.stated <= numbers.known,
                        _changes(numbers.stated - others.known, others.stated - numbers.known))


def translated_verdicts(made: str, source: str, language: str, keep_quotes: bool, max_untranslated: float
                        ) -> Iterator[SampleVerdict]:
    """Yield whether a translation is in its language, and nothing was left as it was."""
    text, original = (KEPT.sub(" ", part) for part in (made, source))
    if keep_quotes:
        # the longest first, since a quote may be a part of another
        for quote in sorted(quotes_of(original), key=len, reverse=True):
            text, original = text.replace(quote, " "), original.replace(quote, " ")
    yield in_language(text, language)
    # a short text has no runs of words, and would count as translated
    is_same = " ".join(text.split()) == " ".join(original.split()) and any(c.isalpha() for c in original)
    untranslated = 1.0 if is_same else copied_share(text, original, COPIED_WORDS)
    yield within("untranslated", untranslated, 0, max_untranslated)


def within(check: str, value: float, least: float, most: float) -> SampleVerdict:
    return SampleVerdict(check, least <= value <= most, f"{value:.2f}, must lie from {least:g} to {most:g}")


def _changes(lost: Counter[str] | frozenset[str], new: Counter[str] | frozenset[str]) -> str:
    return "; ".join(f"{what}: {', '.join(part[:60] for part in sorted(parts)[:_MAX_TOLD])}"
                     for what, parts in (("lost", lost), ("new", new)) if parts)


@dataclass(frozen=True)
class TranslationSettings(DocumentSettings):
    """What is translated into which language, and what is kept."""

    form: Form = "text"
    """What the input is and the output becomes: documents with text, chats with messages, prompts."""
    source_language: Annotated[ToldApart, other_than("language")] = ""
    """Of the input; empty: as each document reads."""
    keep_quotes: bool = False
    """What stands between quotation marks stays as it is, such as a text that a user asks about."""
    min_chrf: Annotated[float, Ge(0), Le(100)] = 40.0
    """Of 100, of the translation back into the source's language against the source; 0: no way back."""
    min_ratio: Annotated[NotNegative, below("max_ratio")] = 0.25
    """Of the translation's characters to the source's, at least."""
    max_ratio: float = 4.0
    """At most."""
    min_faithfulness: Grade = 7.0
    """Of 10, from the judge, who sees both; 0: no judge."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together, and what is missing."""
        said = require("min_chrf", "sacrebleu", extra="synth") if self.min_chrf else []
        return list(map(as_problem, said)) + find_broken(self, "", (
            bool(self.language), "language", "is empty", "name the language to translate into, such as ko"))


class TranslationGenerator(Generator):
    """Translates, forwards and back."""

    name: ClassVar[str] = "translation"
    kind: Kind = "text"
    help: ClassVar[str] = "documents, chats or prompts in another language, checked by the way back"
    libraries: ClassVar[Sequence[str]] = ("py3langid",)
    Settings: ClassVar[type[Any]] = TranslationSettings
    settings: TranslationSettings

    def __init__(self, settings: TranslationSettings) -> None:
        super().__init__(settings)
        self.kind = settings.form

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield pieces of documents, or chats, or prompts; raises UserError for what is none."""
        if self.settings.form == "text":
            return document_items(inputs, self.settings)
        return self._conversations(inputs)

    def _conversations(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        seen: set[str] = set()
        for path in inputs:
            for document in read_documents(list_files(path), RecordReading(kind=self.settings.form)):
                fields = {"messages": [message.to_dict() for message in document.messages],
                          "beside": json.loads(document.extra or "{}"), "has_tools": bool(document.tools)}
                told = json.dumps(fields, ensure_ascii=False, sort_keys=True)
                key = sha256(told.encode()).hexdigest()[:ID_CHARS]
                if key not in seen:
                    seen.add(key)
                    yield GeneratorItem(key, fields, path.name, self.settings.licence)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        is_text = self.settings.form == "text"
        texts: list[str] = ([item.fields["text"]] if is_text
                            else [message["content"] for message in item.fields["messages"]])
        whole = "\n".join(texts)
        source_language = self.settings.source_language or language_of(whole[:LANGUAGE_CHARS])
        if not source_language or source_language == self.settings.language:
            yield (unknown_language(whole) if not source_language else
                   refused(whole, "source language", f"is {source_language} already"))
            return
        if not is_text and (item.fields["has_tools"] or any(
                set(message) > {"role", "content"} for message in item.fields["messages"])):
            yield refused(whole, "plain messages", "has tools or thoughts, which are not translated")
            return
        # a document was cut into pieces; a message cannot be
        if (longest := max(len(text.encode()) for text in texts)) > self.settings.max_piece_bytes:
            yield refused(whole, "length", f"a message has {longest:,} bytes; see max_piece_bytes")
            return
        made: list[str] = []
        verdicts: list[SampleVerdict] = []
        notes: dict[str, Any] = {"source_language": source_language}
        for text in texts:
            if not text.strip():
                made.append(text)
                continue
            reply = self._forward(text, source_language, ask)
            found = read_tagged(reply.text, "translation")
            made.append(found["translation"] if found else reply.text[:MAX_KEPT_CHARS])
            checks = self._checks(made[-1], text, source_language, reply, found is not None, ask, notes)
            for verdict in checks:  # no further one is asked for, and paid, after one that fails
                verdicts.append(verdict)
                if not verdict.passed:
                    break
            if not verdicts[-1].passed:
                # the others stay as they are: the record has a text for each message
                made += texts[len(made):]
                break
        yield GeneratedSample(self._record(item, made), tuple(verdicts), "", notes)

    def _forward(self, text: str, source_language: str, ask: Ask) -> Reply:
        settings = self.settings
        reply, = ask("translation/forward", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     text=fenced(text), language=name_of(settings.language),
                     source_language=name_of(source_language), keep_quotes=settings.keep_quotes)
        return reply

    def _checks(self, made: str, source: str, source_language: str, reply: Reply, has_form: bool, ask: Ask,
                notes: dict[str, Any]) -> Iterator[SampleVerdict]:
        settings = self.settings
        language = settings.language
        yield SampleVerdict("complete", not reply.is_cut,
                            "cut off at the limit of tokens" if reply.is_cut else "")
        yield SampleVerdict("form", has_form, "" if has_form else "has not the form that was asked for")
        yield from kept_verdicts(made, source, language, source_language, settings.keep_quotes)
        yield from translated_verdicts(made, source, language, settings.keep_quotes,
                                       MAX_UNTRANSLATED_SHARE)
        yield within("length", len(made) / len(source), settings.min_ratio, settings.max_ratio)
        if settings.min_chrf:
            back, = ask("translation/back", temperature=0.0, max_tokens=settings.max_tokens,
                        text=fenced(made), language=name_of(language),
                        source_language=name_of(source_language))
            found = read_tagged(back.text, "translation")
            agreement = chrf(found["translation"], source) if found else 0.0
            # of a chat the worst message counts
            notes["chrf"] = round(min(agreement, notes.get("chrf", 100.0)), 2)
            yield SampleVerdict("back translation", agreement >= settings.min_chrf,
                                f"chrF {agreement:.1f}, at least {settings.min_chrf:g}")
        if settings.min_faithfulness:
            yield graded(ask, "translated", TRANSLATED, {"source": source, "translation": made},
                         settings.min_faithfulness)

    def _record(self, item: GeneratorItem, made: Sequence[str]) -> dict[str, Any]:
        language = {"language": self.settings.language}
        if self.settings.form == "text":
            return {"text": made[0], **language}
        messages = [{**message, "content": text}
                    for message, text in zip(item.fields["messages"], made, strict=True)]
        if self.settings.form == "chat":
            return {"messages": messages, **language}
        return {**item.fields["beside"], "prompt": messages, **language}


@lru_cache(maxsize=1)
def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf(text: str, reference: str) -> float:
    """Return the chrF of a text against a reference, 0 to 100."""
    return float(_metric().sentence_score(text, [reference]).score)
