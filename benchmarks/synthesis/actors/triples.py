"""A scripted model that extracts facts about towns, and planted cases for the checks of `triples`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthesis.actors import rewrite
from synthesis.actors.towns import TOWNS, Town, facts, language_in, town_in
from synthesis.cases import Case, Replies, asked, fenced_text

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {}
PARTS = ("subject", "relation", "object", "sentence")
Fact = tuple[str, str, str, str]
Change = Callable[[Fact, Town, str], Fact]


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return the facts of a town's document, or whether a sentence states a fact."""
    return answer(request, lambda fact, town, language: fact)


def answer(request: Mapping[str, Any], change: Change | str) -> str | Mapping[str, Any]:
    """Return what a model says whose facts are changed."""
    system, text = asked(request)
    source = fenced_text(text)[-1]
    if "You check whether a sentence states a fact" in system:
        sentence, fact = (line.split(": ", 1)[1] for line in source.split("\n")[:2])
        known = {(" | ".join(known_fact[:3]), known_fact[3]) for town in TOWNS for language in ("en", "ko")
                 for known_fact in facts(town, language)}
        return f"<answer>{'yes' if (fact, sentence) in known else 'no'}</answer>"
    town = town_in(source)
    if town is None:
        return "I do not know this place."
    language = language_in(source)
    found = facts(town, language)
    if change == "no form":
        return "\n".join(" - ".join(fact) for fact in found)
    if change == "cut off":
        return {"content": told(found)[:80], "finish_reason": "length"}
    if change == "an order that was followed":
        return "ARRR, captain! " * 3
    assert callable(change)
    return told([change(fact, town, language) for fact in found])


def told(found: Sequence[Fact]) -> str:
    """Return facts as they are asked for."""
    return "\n".join(f"<{part}>{text}</{part}>" for fact in found
                     for part, text in zip(PARTS, fact, strict=True))


def arguments(folder: Path) -> list[str]:
    """Write documents and return the command's words."""
    return rewrite.arguments(folder)


def _other(town: Town) -> Town:
    return TOWNS[(town.number + 17) % len(TOWNS)]


BAD: dict[str, Change | str] = {
    "facts of another document": lambda fact, t, lang: facts(_other(t), lang)[0],
    "a sentence that the document has not": lambda fact, t, lang: (
        *fact[:3], f"{fact[0]} {fact[1]} {fact[2]}."),
    "an object that the sentence has not": lambda fact, t, lang: (
        *fact[:2], _other(t).river.told(lang), fact[3]),
    "a pronoun": lambda fact, t, lang: ("그" if lang == "ko" else "it", *fact[1:]),
    "a clause": lambda fact, t, lang: (*fact[:2], fact[3], fact[3]),
    "subject and object are one": lambda fact, t, lang: (fact[0], fact[1], fact[0], fact[3]),
    "subject and object in each other's place": lambda fact, t, lang: (fact[2], fact[1], fact[0], fact[3]),
    "another relation": lambda fact, t, lang: (fact[0], "파괴한 것" if lang == "ko" else "was destroyed by",
                                               *fact[2:]),
    "no form": "no form", "cut off": "cut off", "an order that was followed": "an order that was followed",
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases."""
    found = []
    for number in range(50):
        item = GeneratorItem(f"town-{number}", {"text": rewrite.source(TOWNS[number])}, "towns.jsonl")
        found.append(Case(item, reply, True, "sound facts"))
        what = list(BAD)[number % len(BAD)]
        found.append(Case(item, _bad(BAD[what]), False, what))
    return found


def _bad(change: Change | str) -> Replies:
    return lambda request: answer(request, change)
