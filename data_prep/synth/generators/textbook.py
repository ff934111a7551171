"""`textbook`: a lesson with exercises on what a document says.

As phi-1.5 (arXiv 2309.05463) and Cosmopedia made textbooks for pretraining, with a reader in mind; here each
lesson stands on a document of the user's, and each exercise is solved again with the lesson alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from data_prep.synth.generator import Ask, GeneratedSample, Grade, Kind, SampleVerdict
from data_prep.synth.generators.documents.facts import fact_verdicts
from data_prep.synth.generators.documents.languages import in_language, name_of
from data_prep.synth.generators.documents.pieces import DocumentSettings, OfDocuments, fenced
from data_prep.synth.generators.documents.verdicts import (
    FAITHFUL, agreed, answer_in, are_passed, complete, copied_share, graded, malformed, read_list,
    read_tagged, within)
from megatron_sov.base.settings import AtLeastOne, Share

Level = Literal["children", "school", "university"]
COPIED_WORDS = 8
"""Runs of so many words that stand in the document count as copied."""
_HEADING = re.compile(r"^## \S.*$", re.MULTILINE)
MIN_SECTION_CHARS = 40
"""Of a section's text; a heading with less below it is no section."""


@dataclass(frozen=True)
class TextbookSettings(DocumentSettings):
    """What lessons are made, and what is kept."""

    level: Level = "school"
    """Who it is for: children, school, university."""
    num_sections: AtLeastOne = 2
    """Of a lesson, at least."""
    num_exercises: AtLeastOne = 3
    """Of a lesson, at least; each has to be solved as its answer says."""
    max_copied_share: Share = 0.4
    """Of the lesson's runs of words, those that are copied."""
    min_faithfulness: Grade = 7.0
    """Of 10, from the judge: whether all that the lesson says follows from the document; 0: no judge."""
    min_agreement: Grade = 7.0
    """Of 10, from the judge, where an exercise is solved in other words than its answer has; 0: no judge, and
    answers must be the same word for word."""


class Textbook(OfDocuments):
    """Makes a lesson of each document."""

    name: ClassVar[str] = "textbook"
    kind: Kind = "text"
    help: ClassVar[str] = "lessons with exercises on what documents say"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "textbook/lesson": ("document", "language", "level", "num_sections", "num_exercises"),
        "textbook/solve": ("lesson", "language", "question")}
    Settings: ClassVar[type[Any]] = TextbookSettings
    settings: TextbookSettings

    def make_from(self, source: str, source_language: str, group: str, ask: Ask) -> Iterator[GeneratedSample]:
        settings = self.settings
        language = settings.language or source_language
        record = {"level": settings.level, "language": language}
        reply, = ask("textbook/lesson", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     document=fenced(source), language=name_of(language), level=settings.level,
                     num_sections=settings.num_sections, num_exercises=settings.num_exercises)
        parts = read_tagged(reply.text, "title", "lesson", "exercises")
        exercises = read_list(parts["exercises"], "question", "answer") if parts else None
        if parts is None or exercises is None:
            yield malformed(reply, record, group)
            return
        told = "\n".join([parts["title"], parts["lesson"], *(e["question"] for e in exercises)])
        copied = copied_share(parts["lesson"], source, COPIED_WORDS)
        verdicts = [complete(reply), self._sections(parts["lesson"]),
                    SampleVerdict("number of exercises", len(exercises) >= settings.num_exercises,
                                  f"{len(exercises)}, at least {settings.num_exercises}"),
                    in_language(told, language),
                    *fact_verdicts(told, source, language, source_language),
                    within("copied", copied, 0, settings.max_copied_share)]
        # from here on checks are paid
        if settings.min_faithfulness and are_passed(verdicts):
            verdicts.append(graded(ask, "faithful", FAITHFUL, {"source": source, "text": parts["lesson"]},
                                   settings.min_faithfulness))
        if are_passed(verdicts):
            verdicts += self._solved(parts["lesson"], exercises, language, ask)
        notes = {"copied_share": round(copied, 4), "num_exercises": len(exercises)}
        yield GeneratedSample({"text": page(parts["title"], parts["lesson"], exercises), **record},
                              tuple(verdicts), group, notes)

    def _sections(self, lesson: str) -> SampleVerdict:
        _, *texts = _HEADING.split(lesson)
        count = sum(len(text.strip()) >= MIN_SECTION_CHARS for text in texts)
        return SampleVerdict("sections", count >= self.settings.num_sections and count == len(texts),
                             f"{count} of {len(texts)} headings have a text")

    def _solved(self, lesson: str, exercises: Sequence[Mapping[str, str]], language: str, ask: Ask
                ) -> Iterator[SampleVerdict]:
        """Yield whether each exercise is solved with the lesson alone as its answer says."""
        for exercise in exercises:
            # without the document: the lesson has to teach what it asks
            reply, = ask("textbook/solve", temperature=0.0, lesson=fenced(lesson), language=name_of(language),
                         question=exercise["question"])
            verdict = agreed(ask, "exercise", exercise["question"], answer_in(reply.text), exercise["answer"],
                             language, self.settings.min_agreement)
            yield verdict
            if not verdict.passed:
                return


def page(title: str, lesson: str, exercises: Sequence[Mapping[str, str]]) -> str:
    asked = "\n\n".join(f"{number}. {exercise['question']}\n\n→ {exercise['answer']}"
                        for number, exercise in enumerate(exercises, 1))
    return f"# {title}\n\n{lesson}\n\n---\n\n{asked}"
