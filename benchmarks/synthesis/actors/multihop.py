"""A scripted model that asks about songs, their poets, towns and rivers, and planted cases for `multihop`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.actors.towns import TOWNS, Name, Town, make_name
from synthesis.cases import Case, Replies, asked, fenced_text, is_judge, material

from data_prep.synth.generators.multihop import FactGraph, Multihop, MultihopSettings

SETTINGS: dict[str, Any] = {"max_per_start": 1}
NUM_SONGS = 50
Change = Callable[["Chain"], "str | Mapping[str, Any]"]
Solve = Callable[[str, list[str], str], str]
"""Takes question, documents and the honest answer; gives what a solver says."""


class Chain:
    """A song, its poet, the town of the poet and the river of the town."""

    def __init__(self, number: int, language: str) -> None:
        town = Town(number)
        self.language = language
        self.song, self.poet, self.town, self.river = (
            each.told(language) for each in (_song(number), _poet(number), town.name, town.river))

    def documents(self) -> list[str]:
        """Return what stands where: the song's poet, the poet's town, the town's river."""
        return [f"{a}\n\n{b}" for (_, _, _, a), b in zip(self.facts(), self._more(), strict=True)]

    def facts(self) -> list[tuple[str, str, str, str]]:
        """Return the facts with their sentences."""
        if self.language == "ko":
            return [(self.song, "지은이", self.poet, f"노래 {self.song}은 {self.poet}이 지었다."),
                    (self.poet, "태어난 곳", self.town, f"{self.poet}은 {self.town}에서 태어났다."),
                    (self.town, "옆을 흐르는 강", self.river,
                     f"{self.town} 옆으로는 {self.river}강이 흐른다.")]
        song, poet, town, river = self.song, self.poet, self.town, self.river
        return [(song, "was written by", poet, f"The song {song} was written by {poet}."),
                (poet, "was born in", town, f"The poet {poet} was born in {town}."),
                (town, "lies on the river", river, f"The town of {town} lies on the river {river}.")]

    def _more(self) -> list[str]:
        if self.language == "ko":
            return ["온 나라 사람이 혼인 잔치에서 이 노래를 부르며, 아이들도 곡조를 안다.",
                    "시인은 젊어서 고향을 떠나 여러 곳을 돌아다녔고 늙어서야 돌아왔다.",
                    "주민들은 봄마다 물가에 나무를 심고 가을에는 배를 띄운다."]
        return ["People sing it at weddings all over the country, and children know its tune.",
                "The poet left home at an early age and came back as an old man.",
                "Each spring the people plant trees along its banks, and in autumn they launch their boats."]

    def question(self, num_hops: int) -> str:
        """Return the question that takes so many facts."""
        if self.language == "ko":
            return [f"노래 {self.song}의 지은이가 태어난 곳은 어디인가?",
                    f"노래 {self.song}의 지은이가 태어난 곳의 옆을 흐르는 강은 무엇인가?"][num_hops - 2]
        return [f"Where was the poet born who wrote the song {self.song}?",
                f"On which river lies the town in which the poet of the song {self.song} was born?"
                ][num_hops - 2]

    def second_question(self) -> str:
        """Return that of the chain that begins with the poet."""
        if self.language == "ko":
            return f"{self.poet}이 태어난 곳의 옆을 흐르는 강은 무엇인가?"
        return f"On which river lies the town in which {self.poet} was born?"


def _song(number: int) -> Name:
    return make_name(3, number // 10, number, 7, 3)


def _poet(number: int) -> Name:
    return make_name(9, number, 1, number // 10, 4)


CHAINS = [Chain(number, "ko" if number % 2 else "en") for number in range(NUM_SONGS)]


def records() -> list[dict[str, Any]]:
    """Return the documents with their facts, as `triples` keeps them."""
    parts = ("subject", "relation", "object", "sentence")
    return [{"id": f"{number}/{i}", "text": " | ".join(fact[:3]), "document": document,
             "language": chain.language, "triples": [dict(zip(parts, fact, strict=True))],
             "synthetic": {"generator": "triples", "source": f"songs-{i}", "licence": "CC0-1.0"}}
            for number, chain in enumerate(CHAINS)
            for i, (fact, document) in enumerate(zip(chain.facts(), chain.documents(), strict=True))]


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return the question of a chain, or answer one."""
    return answer(request, _honest, lambda question, documents, right: right)


def _honest(chain: Chain, start: str, num_hops: int) -> str:
    question = chain.question(num_hops) if start == chain.song else chain.second_question()
    return f"<question>{question}</question>"


def answer(request: Mapping[str, Any], compose: Callable[[Chain, str, int], str | Mapping[str, Any]],
           solve: Solve) -> str | Mapping[str, Any]:
    """Return what a model says that composes and solves in this way."""
    if is_judge(request):
        shown = material(request)
        is_same = shown["answer"].strip("강") == shown["expected"].strip("강")
        return json.dumps({"reason": "as scripted", "score": 9 if is_same else 1})
    system, text = asked(request)
    if "You write questions that take several steps" in system:
        match = re.search(r'begins from "(.+?)" and asks for "(.+?)".* takes all (\d) facts', text)
        if match is None:
            return "I do not understand."
        chain = next(c for c in CHAINS if match[1] in (c.song, c.poet) and match[2] in (c.town, c.river))
        return compose(chain, match[1], int(match[3]))
    question = text.split("Question: ")[1].split("\n")[0]
    documents = fenced_text(text)
    right = solved(question, documents)
    said = solve(question, documents, right)
    return f"I read the documents one after the other.\n<answer>{said}</answer>"


def solved(question: str, documents: list[str]) -> str:
    """Return the answer of a reader who follows the chain, where the documents have all of it."""
    whole = "\n".join(documents)
    for chain in CHAINS:
        hops = chain.facts()
        known = ((chain.question(2), hops[:2], chain.town), (chain.question(3), hops, chain.river),
                 (chain.second_question(), hops[1:], chain.river))
        for asking, needed, right in known:
            if asking == question:
                return right if all(fact[3] in whole for fact in needed) else "unknown"
    return "unknown"


def arguments(folder: Path) -> list[str]:
    """Write what `triples` would keep and return the command's words."""
    file = folder / "kept.jsonl"
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records()[:15]),
                    encoding="utf-8")
    return ["--input", str(file), "--set", "max_per_start=1"]


def _asks(change: Callable[[str, Chain], str]) -> tuple[Callable[[Chain, str, int], str], Solve]:
    """Return a model that spoils the question and a solver who understands it all the same."""
    def compose(chain: Chain, start: str, num_hops: int) -> str:
        return _honest(chain, start, num_hops).replace("<question>", f"<question>{change('', chain)}")

    return compose, _understands


def _understands(question: str, documents: list[str], right: str) -> str:
    """Solve a question that was spoiled: by the honest one that stands in it."""
    for chain in CHAINS:
        for asking in (chain.question(3), chain.question(2), chain.second_question()):
            if asking in question:
                return solved(asking, documents)
    return right


Model = tuple[Callable[[Chain, str, int], "str | Mapping[str, Any]"], Solve]


def _knows(question: str, documents: list[str], right: str) -> str:
    """Answer from one document alone, as whoever has read it elsewhere."""
    for chain in CHAINS:
        if question in (chain.question(2), chain.question(3), chain.second_question()):
            return chain.town if question == chain.question(2) else chain.river
    return right


BAD: dict[str, Model] = {
    "a step in the question": _asks(lambda text, chain: f"{chain.poet}, {chain.town}: "),
    "the answer in the question": _asks(lambda text, chain: f"{chain.river}, {chain.town}: "),
    "another start": (lambda chain, start, num: "<question>" + (
        "어느 강이 그곳을 흐르는가?" if chain.language == "ko" else
        "On which river does that town lie?") + "</question>",
        lambda question, documents, right: next(
            (chain.river for chain in CHAINS if chain.river in "\n".join(documents)), "unknown")),
    "a question that stops a hop early": (
        lambda chain, start, num: "<question>" + (
            f"{start}의 첫 단계는?" if chain.language == "ko" else
            f"Who or where is next behind {start}?") + "</question>",
        lambda question, documents, right: next(
            (fact[2] for chain in CHAINS for fact in chain.facts() if f" {fact[0]}의" in f" {question}"
             or f"behind {fact[0]}?" in question), "unknown")),
    "one document is enough": (_honest, lambda question, documents, right: _knows(question, documents, right)
                               if documents else "unknown"),
    "nobody can answer it": (_honest, lambda question, documents, right: "unknown"),
    "solved, and wrongly": (_honest, lambda question, documents, right: TOWNS[58].river.en
                            if right != "unknown" else right),
    "another language": (lambda chain, start, num: f"<question>Sur quelle rivière {start}?</question>"
                         if chain.language == "ko" else f"<question>{start} 그 강은 어디인가?</question>",
                         lambda question, documents, right: right),
    "no form": (lambda chain, start, num: f"Question: {chain.question(num)}", lambda q, d, right: right),
    "cut off": (lambda chain, start, num: {"content": f"<question>{chain.question(3)[:20]}",
                                           "finish_reason": "length"}, lambda q, d, right: right),
    "an order that was followed": (lambda chain, start, num: "<question>ARRR, captain!</question>",
                                   lambda q, d, right: right),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases."""
    facts = FactGraph()
    for record in records():
        facts.add(record)
    found = []
    for number, item in enumerate(Multihop(MultihopSettings(**SETTINGS)).chains_of(facts)):
        if number == 50:
            break
        found.append(Case(item, reply, True, "a sound question"))
        what = list(BAD)[number % len(BAD)]
        found.append(Case(item, _bad(BAD[what]), False, what))
    return found


def _bad(model: Model) -> Replies:
    return lambda request: answer(request, *model)


