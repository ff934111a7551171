"""A scripted model that asks about towns, and planted cases for the checks of `questions`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.actors import rewrite
from synthesis.actors.towns import TOWNS, Town, language_in, pairs, town_in
from synthesis.cases import Case, Replies, asked, fenced_text, is_judge, material

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {"min_pairs": 3}
Pairs = list[tuple[str, str]]
Change = Callable[[Pairs, Town, str], "Pairs | str | Mapping[str, Any]"]
"""Takes pairs, town and language; gives other pairs, or what is answered in their place."""


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return pairs about the town of a document, or answer a question."""
    return answer(request, lambda asked_pairs, town, language: asked_pairs)


def answer(request: Mapping[str, Any], change: Change) -> str | Mapping[str, Any]:
    """Return what a model says whose pairs are changed."""
    if is_judge(request):
        shown = material(request)
        is_there = shown.get("answer", "?") in shown.get("source", "")
        return json.dumps({"reason": "as scripted", "score": 9 if is_there else 1})
    system, text = asked(request)
    sources = fenced_text(text)
    if "You answer questions" in system:
        question = text.split("Question: ")[1].split("\n")[0]
        return f"<answer>{solved(question, sources[0]) if sources else 'unknown'}</answer>"
    town = town_in(sources[-1])
    if town is None:
        return "I do not know this place."
    language = language_in(sources[-1])
    made = change(list(pairs(town, language)), town, language)
    if not isinstance(made, list):
        return made
    return "\n".join(f"<question>{q}</question>\n<answer>{a}</answer>" for q, a in made)


def solved(question: str, source: str) -> str:
    """Return what a reader who knows the towns answers, if the document says it."""
    for town in TOWNS:
        for language in ("en", "ko"):
            for asking, right in pairs(town, language):
                if asking == question and right.strip("년명강") in source:
                    return right
    return "unknown"


def arguments(folder: Path) -> list[str]:
    """Write documents and return the command's words."""
    return [*rewrite.arguments(folder), "--set", "min_pairs=3"]


def _each(change: Callable[[str, str, Town, str], tuple[str, str]]) -> Change:
    """Return a change of all pairs but two, which are too few to be kept."""
    return lambda made, t, lang: [*made[:2], *(change(q, a, t, lang) for q, a in made[2:])]


def _other(t: Town) -> Town:
    return TOWNS[(t.number + 11) % len(TOWNS)]


BAD: dict[str, Change] = {
    "answers of another document": lambda made, t, lang: [
        *made[:2], *((q, a) for (q, _), (_, a) in zip(made[2:], pairs(_other(t), lang)[2:], strict=True))],
    "questions of another document": lambda made, t, lang: [*made[:2], *pairs(_other(t), lang)[2:]],
    "right words, to another question": lambda made, t, lang: [
        *made[:2], *((q, made[0][1]) for q, _ in made[2:])],
    "numbers that the document has not": _each(lambda q, a, t, lang: (q, "19,402")),
    "answers in the questions": _each(lambda q, a, t, lang: (f"{q} ({a})", a)),
    "questions about a text": _each(lambda q, a, t, lang: (
        f"이 글에 따르면 {q}" if lang == "ko" else f"According to the text, {q}", a)),
    "the same question again": lambda made, t, lang: [*made[:2], *[made[0]] * 4],
    "another language": lambda made, t, lang: [*made[:2], *pairs(t, "en" if lang == "ko" else "ko")[2:]],
    "questions that the document does not answer": _each(lambda q, a, t, lang: (
        (f"{t.name.told(lang)}의 옛 이름은?" if lang == "ko" else
         f"Which name did {t.name.told(lang)} have before?"), t.river.told(lang))),
    "two pairs alone": lambda made, t, lang: made[:2],
    "an order that was followed": lambda made, t, lang: "ARRR, captain! " * 3,
    "cut off": lambda made, t, lang: {"content": f"<question>{made[0][0]}</question><answer>{made[0][1]}",
                                      "finish_reason": "length"},
    "no form": lambda made, t, lang: "\n".join(f"Q: {q} A: {a}" for q, a in made),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases."""
    found = []
    for number in range(50):
        town = TOWNS[number]
        item = GeneratorItem(f"town-{number}", {"text": rewrite.source(town)}, "towns.jsonl")
        found.append(Case(item, reply, True, "sound pairs"))
        what = list(BAD)[number % len(BAD)]
        found.append(Case(item, _bad(BAD[what]), False, what))
    return found


def _bad(change: Change) -> Replies:
    return lambda request: answer(request, change)
