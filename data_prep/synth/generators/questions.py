"""`questions`: questions that a document answers, with answers that it has.

Nemotron-CC (arXiv 2412.02595) sets such pairs behind their documents for pretraining.  Here each pair is
asked again: with the document a model must come to the answer, and what it says without is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from data_prep.synth.generator import Ask, GeneratedSample, Grade, Kind, SampleVerdict
from data_prep.synth.generators.documents.facts import fact_verdicts
from data_prep.synth.generators.documents.languages import in_language, name_of
from data_prep.synth.generators.documents.pieces import DocumentSettings, OfDocuments, fenced
from data_prep.synth.generators.documents.verdicts import (
    agreed, answer_in, are_passed, complete, graded, letters_likeness, malformed, read_list, stands_in,
    until_failed)
from megatron_sov.base.settings import AtLeastOne, Share, at_most, only_with

Form = Literal["text", "chat", "prompt"]
SUPPORTED = ("Does SOURCE say what ANSWER says in reply to QUESTION? 10: it says exactly this; 0: it says "
             "something else, or nothing of it.")
_POINTS_AT_TEXT = re.compile(
    r"\b(?:th(?:e|is)|given|provided|above)\s+(?:\w+\s+)?(?:text|document|passage|article|paragraph|excerpt)\b"
    r"|according to (?:the|this) (?:author|source)\b"
    r"|(?:이|위|본|해당|주어진|다음)\s?(?:글|문서|본문|지문|기사|문단)"
    r"|(?:글|문서|본문|지문)에\s?(?:따르면|의하면)|(?:この|本|上記の)(?:文章|文書|記事|文)"
    r"|(?:เอกสาร|บทความ|ข้อความ)(?:นี้|ข้างต้น)"
    r"|(?:本文|这篇|该)(?:文章|文档|文|中)", re.IGNORECASE)


@dataclass(frozen=True)
class QuestionSettings(DocumentSettings):
    """What is asked, and what is kept."""

    form: Form = "text"
    """text: the document with its pairs behind it, for pretraining; chat: the document with a question, and
    the answer, for `sft`; prompt: the same with `answer` beside it, for `rl generate` (reward `stem`)."""
    num_pairs: AtLeastOne = 6
    """That are asked for, of each document."""
    min_pairs: Annotated[AtLeastOne, at_most("num_pairs")] = 1
    """Of form text: a document of which fewer are kept is none."""
    max_likeness: Share = 0.7
    """Of two questions of a document (Jaccard index of their runs of three letters); more is the same one."""
    min_support: Grade = 7.0
    """Of 10, from the judge, for an answer that does not stand in the document word for word; 0: it must."""
    min_agreement: Grade = 7.0
    """Of 10, from the judge, where the question is answered with the document in other words; 0: no judge."""
    ask_without: bool = True
    """Ask each question without the document too, which is noted as `known_without`."""
    refuse_known: Annotated[bool, only_with("ask_without")] = False
    """Whether a question that is answered without its document is left out; needs ask_without."""


class Questions(OfDocuments):
    """Makes questions with answers of each document."""

    name: ClassVar[str] = "questions"
    kind: Kind = "text"
    help: ClassVar[str] = "questions with answers that documents have; as text, chats or prompts (form)"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "questions/pairs": ("document", "language", "num_pairs"),
        "questions/solve": ("document", "language", "question")}
    Settings: ClassVar[type[Any]] = QuestionSettings
    settings: QuestionSettings

    def __init__(self, settings: QuestionSettings) -> None:
        super().__init__(settings)
        self.kind = settings.form

    def make_from(self, source: str, source_language: str, group: str, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield each pair; of form text those that are not kept, and the document with those that are."""
        settings = self.settings
        language = settings.language or source_language
        reply, = ask("questions/pairs", temperature=settings.temperature, max_tokens=settings.max_tokens,
                     document=fenced(source), language=name_of(language), num_pairs=settings.num_pairs)
        pairs = read_list(reply.text, "question", "answer")
        if pairs is None or reply.is_cut:
            yield malformed(reply, {}, group)
            return
        kept: list[Mapping[str, str]] = []
        notes: list[Mapping[str, Any]] = []
        for pair in pairs[:settings.num_pairs]:
            verdicts, seen = self._verdicts(pair, kept, source, language, source_language, ask)
            is_kept = are_passed(verdicts)
            if is_kept:
                kept.append(pair)
                notes.append(seen)
            # of form text kept pairs go into the one sample below
            if settings.form != "text" or not is_kept:
                yield GeneratedSample(self._record(source, pair, language), tuple(verdicts), group, seen)
        if settings.form == "text":
            count = SampleVerdict("number of pairs", len(kept) >= settings.min_pairs,
                                  f"{len(kept)} of {len(pairs)} are kept")
            yield GeneratedSample({"text": with_pairs(source, kept), "language": language},
                                  (complete(reply), count), group, {"num_pairs": len(kept), "pairs": notes})

    def _verdicts(self, pair: Mapping[str, str], before: Sequence[Mapping[str, str]], source: str,
                  language: str, source_language: str, ask: Ask
                  ) -> tuple[list[SampleVerdict], dict[str, Any]]:
        """Return the verdicts of a pair, up to the first that it does not pass, and what was seen."""
        notes: dict[str, Any] = {}
        return until_failed(self._checks(pair["question"], pair["answer"], before, source, language,
                                         source_language, ask, notes)), notes

    def _checks(self, question: str, answer: str, before: Sequence[Mapping[str, str]], source: str,
                language: str, source_language: str, ask: Ask,
                notes: dict[str, Any]) -> Iterator[SampleVerdict]:
        settings = self.settings
        yield in_language(f"{question}\n{answer}", language)
        yield SampleVerdict("question stands alone", not (pointed := _POINTS_AT_TEXT.search(question)),
                            f"speaks of {pointed[0]!r}" if pointed else "")
        yield SampleVerdict("answer not in question", not stands_in(answer, question))
        # with those that are kept: a pair that failed keeps no other one out
        alike = max((letters_likeness(question, other["question"]) for other in before), default=0.0)
        yield SampleVerdict("another question", alike <= settings.max_likeness,
                            f"{alike:.2f} like one before")
        yield from fact_verdicts(f"{question}\n{answer}", source, language, source_language)
        if not stands_in(answer, source):
            if not settings.min_support:
                # `until_failed` stops here, so the judge below is not paid
                yield SampleVerdict("answer in document", False, "does not stand there word for word")
            yield graded(ask, "supported", SUPPORTED, {"source": source, "question": question,
                                                       "answer": answer}, settings.min_support)
        # the dearest checks come last: each solves the question again
        given = self._solve(question, fenced(source), language, ask)
        yield agreed(ask, "answered with document", question, given, answer, language, settings.min_agreement)
        if settings.ask_without:
            guess = self._solve(question, "", language, ask)
            notes["known_without"] = agreed(ask, "known", question, guess, answer, language,
                                            settings.min_agreement).passed
            if settings.refuse_known:
                yield SampleVerdict("needs the document", not notes["known_without"],
                                    f"answered {guess[:80]!r}")

    def _solve(self, question: str, document: str, language: str, ask: Ask) -> str:
        reply, = ask("questions/solve", temperature=0.0, document=document, question=question,
                     language=name_of(language))
        return answer_in(reply.text)

    def _record(self, source: str, pair: Mapping[str, str], language: str) -> dict[str, Any]:
        question, answer = pair["question"], pair["answer"]
        if self.settings.form == "text":
            return {"text": with_pairs("", [pair]), "language": language}
        asked = f"{source}\n\n{question}"
        if self.settings.form == "prompt":
            return {"prompt": asked, "answer": answer, "language": language}
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
                "language": language}


def with_pairs(document: str, pairs: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join([*([document] if document else []),
                        *(f"Q: {pair['question']}\nA: {pair['answer']}" for pair in pairs)])
