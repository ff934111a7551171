"""`rewrite`: a document said again in other words, which states nothing that it did not state.

As Nemotron-CC does with the documents of the web (arXiv 2412.02595): paraphrases in the manner of an
encyclopedia and clear prose, here with checks of what was kept, and as a dialogue besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import MinLen

from data_prep.synth.generator import Ask, GeneratedSample, Grade, Kind, SampleVerdict
from data_prep.synth.generators.documents.facts import fact_verdicts, kept_share
from data_prep.synth.generators.documents.languages import in_language, name_of
from data_prep.synth.generators.documents.pieces import DocumentSettings, OfDocuments, fenced
from data_prep.synth.generators.documents.verdicts import (
    FAITHFUL, are_passed, complete, copied_share, graded, malformed, read_tagged, size_ratio, within)
from megatron_sov.base.settings import ONCE, NotNegative, Share, below

Style = Literal["clearer", "encyclopedic", "dialogue"]
COPIED_WORDS = 8
"""Runs of so many words that stand in the document count as copied."""
MIN_TURNS = 4
"""Of a dialogue."""
_TURN = re.compile(r"([AB]): \S.*")


@dataclass(frozen=True)
class RewriteSettings(DocumentSettings):
    """What is rewritten how, and what is kept."""

    styles: Annotated[tuple[Style, ...], MinLen(1), ONCE] = get_args(Style)
    """Each document is rewritten once in each: clearer, encyclopedic, dialogue."""
    max_copied_share: Share = 0.4
    """Of the rewrite's runs of words, those that are copied; more is a copy."""
    min_kept_share: Share = 0.5
    """Of the document's numbers and names, those that the rewrite has; fewer is another text."""
    min_ratio: Annotated[NotNegative, below("max_ratio")] = 0.4
    """Of the rewrite's words to the document's, where both are in one language."""
    max_ratio: float = 2.5
    """The same; more was made up, or is said twice."""
    min_faithfulness: Grade = 7.0
    """Of 10, from the judge: whether all that it says follows from the document; 0: no judge."""


class Rewrite(OfDocuments):
    """Rewrites each document in each style."""

    name: ClassVar[str] = "rewrite"
    kind: Kind = "text"
    help: ClassVar[str] = "documents in other words: clearer, as an encyclopedia, as a dialogue"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "rewrite/rewrite": ("document", "language", "style")}
    Settings: ClassVar[type[Any]] = RewriteSettings
    settings: RewriteSettings

    def make_from(self, source: str, source_language: str, group: str, ask: Ask) -> Iterator[GeneratedSample]:
        for style in self.settings.styles:
            yield self._sample(source, source_language, style, group, ask)

    def _sample(self, source: str, source_language: str, style: str, group: str, ask: Ask) -> GeneratedSample:
        settings = self.settings
        language = settings.language or source_language
        record = {"style": style, "language": language}
        reply, = ask("rewrite/rewrite", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     document=fenced(source), language=name_of(language), style=style)
        found = read_tagged(reply.text, "rewrite")
        if found is None:
            return malformed(reply, record, group)
        text = found["rewrite"]
        # marks of speakers are neither words nor names of the text
        said = re.sub(r"^[AB]: ", "", text, flags=re.MULTILINE) if style == "dialogue" else text
        copied = copied_share(said, source, COPIED_WORDS)
        ratio, kept = size_ratio(said, source), kept_share(said, source, language, source_language)
        verdicts = [complete(reply), in_language(said, language),
                    *([dialogue(text)] if style == "dialogue" else []),
                    *fact_verdicts(said, source, language, source_language),
                    within("copied", copied, 0, settings.max_copied_share)]
        # words of two languages are not counted alike
        if language == source_language:
            verdicts.append(within("length", ratio, settings.min_ratio, settings.max_ratio))
        if kept is not None:
            verdicts.append(within("kept facts", kept, settings.min_kept_share, 1))
        # the judge is paid, so it sees what passed all else
        if settings.min_faithfulness and are_passed(verdicts):
            verdicts.append(graded(ask, "faithful", FAITHFUL, {"source": source, "text": text},
                                   settings.min_faithfulness))
        notes = {"copied_share": round(copied, 4), "size_ratio": round(ratio, 4), "kept_share": kept}
        return GeneratedSample({"text": text, **record}, tuple(verdicts), group, notes)


def dialogue(text: str) -> SampleVerdict:
    """Return whether a text is a dialogue: turns of A and B, who alternate."""
    turns = [_TURN.fullmatch(line) for line in text.split("\n") if line.strip()]
    speakers = [turn[1] for turn in turns if turn]
    if len(speakers) < len(turns):
        return SampleVerdict("dialogue", False, "a line is no turn of A or B")
    alternate = all(a != b for a, b in pairwise(speakers))
    return SampleVerdict("dialogue", alternate and len(speakers) >= MIN_TURNS and speakers[0] == "A",
                         f"{len(speakers)} turns{'' if alternate else ', one speaks twice in a row'}")
