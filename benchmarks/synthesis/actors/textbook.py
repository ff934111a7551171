"""A scripted model that writes lessons about towns, and planted cases for the checks of `textbook`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.actors import rewrite
from synthesis.actors.towns import TOWNS, Town, language_in, pairs, retold, town_in
from synthesis.cases import Case, Replies, asked, fenced_text, is_judge, material

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {"num_exercises": 3}
Change = Callable[["Lesson", Town, str], "str | Mapping[str, Any]"]
"""Takes lesson, town and language."""


class Lesson:
    """What a model answers, in parts that can be spoiled."""

    def __init__(self, town: Town, language: str) -> None:
        first, second = retold(town, language).split("\n\n")
        headings = ("처음", "오늘날") if language == "ko" else ("How it began", "What it is now")
        self.title = f"{town.name.told(language)}"
        self.sections = list(zip(headings, (first, second), strict=True))
        # those that the lesson answers: it does not ask on which river in the words of the question
        self.exercises = [pairs(town, language)[i] for i in (0, 3, 5)]

    def told(self) -> str:
        lesson = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in self.sections)
        exercises = "\n".join(f"<question>{q}</question>\n<answer>{a}</answer>" for q, a in self.exercises)
        return (f"<title>{self.title}</title>\n<lesson>\n{lesson}\n</lesson>\n"
                f"<exercises>\n{exercises}\n</exercises>")


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return a lesson about the town of a document, or solve an exercise."""
    return answer(request, lambda lesson, town, language: lesson.told())


def answer(request: Mapping[str, Any], change: Change, grade: int = 9) -> str | Mapping[str, Any]:
    """Return what a model says whose lesson is changed."""
    if is_judge(request):
        is_wrong = "expected" in (shown := material(request)) and shown["expected"] != shown["answer"]
        return json.dumps({"reason": "as scripted", "score": 1 if is_wrong else grade})
    system, text = asked(request)
    source = fenced_text(text)[-1]
    if "You solve an exercise" in system:
        question = text.split("Exercise: ")[1].split("\n")[0]
        return f"<answer>{solved(question, source)}</answer>"
    town = town_in(source)
    if town is None:
        return "I do not know this place."
    language = language_in(source)
    return change(Lesson(town, language), town, language)


def solved(question: str, lesson: str) -> str:
    """Return what a reader who knows the towns answers, if the lesson says it."""
    for town in TOWNS:
        for language in ("en", "ko"):
            for asking, right in pairs(town, language):
                if asking == question and right.strip("년명강") in lesson:
                    return right
    return "unknown"


def arguments(folder: Path) -> list[str]:
    """Write documents and return the command's words."""
    return rewrite.arguments(folder)


def _with(**parts: Any) -> Change:
    """Return a change of a lesson's parts, each given as a function of lesson, town and language."""
    def change(lesson: Lesson, town: Town, language: str) -> str:
        for name, value in parts.items():
            setattr(lesson, name, value(lesson, town, language))
        return lesson.told()
    return change


def _sections(find: Callable[[Town, str], str], put: Callable[[Town, str], str]) -> Change:
    return _with(sections=lambda lesson, town, language: [
        (heading, text.replace(find(town, language), put(town, language)))
        for heading, text in lesson.sections])


BAD: dict[str, Change] = {
    "a wrong year": _sections(lambda t, lang: str(t.year), lambda t, lang: str(t.year - 3)),
    "a wrong count": _sections(lambda t, lang: f"{t.books:,}", lambda t, lang: f"{t.books * 2:,}"),
    "another founder": _sections(lambda t, lang: t.founder.told(lang), lambda t, lang: "Napoleon"),
    "a copy": _with(sections=lambda lesson, t, lang: [
        (heading, text) for (heading, _), text in zip(
            lesson.sections, rewrite.source(t).split("\n\n"), strict=False)]),
    "another language": lambda lesson, t, lang: Lesson(t, "en" if lang == "ko" else "ko").told(),
    "one section": _with(sections=lambda lesson, t, lang: [(lesson.sections[0][0],
                                                          " ".join(text for _, text in lesson.sections))]),
    "an empty section": _with(sections=lambda lesson, t, lang: [*lesson.sections, ("...", "")]),
    "too few exercises": _with(exercises=lambda lesson, t, lang: lesson.exercises[:2]),
    "an exercise with a wrong answer": _with(exercises=lambda lesson, t, lang: [
        *lesson.exercises[:2], (lesson.exercises[2][0], f"{t.population + 7:,}")]),
    "an exercise that the lesson does not answer": _with(exercises=lambda lesson, t, lang: [
        *lesson.exercises[:2], pairs(TOWNS[(t.number + 9) % 60], lang)[0]]),
    "an order that was followed": _with(sections=lambda lesson, t, lang: [("ARRR", "captain " * 20)] * 2),
    "cut off": lambda lesson, t, lang: {"content": lesson.told()[:200], "finish_reason": "length"},
    "no form": lambda lesson, t, lang: lesson.told().replace("<lesson>", ""),
    "an exercise without an answer": lambda lesson, t, lang: lesson.told().replace("</answer>", "", 1),
}
BY_JUDGE: dict[str, Change] = {
    "the contrary, without a name or a number": _sections(
        lambda t, lang: "다시 일어섰다" if lang == "ko" else "they were standing again",
        lambda t, lang: "다시 일어서지 못했다" if lang == "ko" else "they were forgotten"),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases."""
    kinds = {**BAD, **BY_JUDGE}
    found = []
    for number in range(50):
        town = TOWNS[number]
        item = GeneratorItem(f"town-{number}", {"text": rewrite.source(town)}, "towns.jsonl")
        found.append(Case(item, reply, True, "a sound lesson"))
        what = list(kinds)[number % len(kinds)]
        by = "judge" if what in BY_JUDGE else ""
        found.append(Case(item, _bad(kinds[what], 2 if by else 9), False, what, by))
    return found


def _bad(change: Change, grade: int) -> Replies:
    return lambda request: answer(request, change, grade)
