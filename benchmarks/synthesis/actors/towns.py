"""Towns that nobody has heard of, with documents about them in English and Korean: what scripted models know."""

from __future__ import annotations

from dataclasses import dataclass

_SYLLABLES = (("ha", "하"), ("neul", "늘"), ("bit", "빛"), ("ga", "가"), ("ram", "람"), ("so", "소"), ("rin", "린"),
              ("mi", "미"), ("dan", "단"), ("bo", "보"))
_TRADES = (("weaver", "직조공"), ("miller", "방앗간 주인"), ("printer", "인쇄공"), ("potter", "도공"))
_INDUSTRIES = (("paper", "제지"), ("glass", "유리"), ("silk", "비단"), ("salt", "소금"))
_MOTTOES = (("Slow water moves the stone", "느린 물이 돌을 옮긴다"), ("A lamp for every door", "문마다 등불 하나"),
            ("First the bridge, then the wall", "다리가 먼저, 담은 나중"))
_MONTHS = ("March", "May", "August", "October")
_MONTH_NUMBERS = (3, 5, 8, 10)
NUM_TOWNS = 60


@dataclass(frozen=True)
class Name:
    """A name as both languages write it."""

    en: str
    ko: str

    def told(self, language: str) -> str:
        return self.ko if language == "ko" else self.en


def _name(*numbers: int) -> Name:
    parts = [_SYLLABLES[number % len(_SYLLABLES)] for number in numbers]
    return Name("".join(en for en, _ in parts).capitalize(), "".join(ko for _, ko in parts))


@dataclass(frozen=True)
class Town:
    """One town."""

    number: int

    @property
    def name(self) -> Name:
        return _name(self.number, self.number // 10, 2, 5)

    @property
    def river(self) -> Name:
        return _name(self.number // 10, self.number, 8, 1)

    @property
    def founder(self) -> Name:
        return _name(6, self.number, self.number // 10 + 3, 9)

    @property
    def origin(self) -> Name:
        return _name(4, 7, self.number, self.number // 10)

    @property
    def year(self) -> int:
        return 1403 + 7 * self.number

    @property
    def fire(self) -> int:
        return self.year + 61

    @property
    def houses(self) -> int:
        return 130 + 3 * self.number

    @property
    def population(self) -> int:
        return 21_000 + 113 * self.number

    @property
    def books(self) -> int:
        return 46_000 + 217 * self.number

    @property
    def hall(self) -> int:
        return self.year + 140

    @property
    def days(self) -> int:
        return 13 + self.number % 9

    def pick(self, choices: tuple[tuple[str, str], ...], language: str) -> str:
        return choices[self.number % len(choices)][language == "ko"]

    def motto(self, language: str) -> str:
        return self.pick(_MOTTOES, language)

    def month(self, language: str) -> str:
        return f"{_MONTH_NUMBERS[self.number % 4]}월" if language == "ko" else _MONTHS[self.number % 4]


TOWNS = tuple(Town(number) for number in range(NUM_TOWNS))


def town_in(text: str) -> Town | None:
    """Return the town that a text names first."""
    places = [(place, town) for town in TOWNS for name in (town.name.en, town.name.ko)
              if (place := text.find(name)) >= 0]
    return min(places, key=lambda found: found[0])[1] if places else None


def language_in(text: str) -> str:
    """Return ko or en, by the letters."""
    return "ko" if sum("가" <= c <= "힣" for c in text) * 3 > sum(c.isascii() and c.isalpha() for c in text) else "en"


def document(t: Town, language: str) -> str:
    """Return a document about a town."""
    n, r, f, o = (name.told(language) for name in (t.name, t.river, t.founder, t.origin))
    if language == "ko":
        return (f"{n}은 {r}강을 끼고 있는 도시이다. {t.year}년에 {o} 출신의 {t.pick(_TRADES, 'ko')} {f}이 이 도시를 세웠다. "
                f"{t.fire}년의 큰불로 집 {t.houses}채가 탔으나 주민들은 곧 다시 지었다.\n\n"
                f"오늘날 {n}에는 {t.population:,}명이 살며, 많은 사람이 {t.pick(_INDUSTRIES, 'ko')} 공장에서 일한다. "
                f"{t.hall}년에 완공된 시청에는 책 {t.books:,}권을 갖춘 도서관이 있다. 도시의 표어는 “{t.motto('ko')}”이다. "
                f"해마다 {t.month('ko')}이면 {t.days}일 동안 장이 선다.")
    return (f"{n} is a town on the river {r}. It was founded in {t.year} by {f}, a {t.pick(_TRADES, 'en')} from {o}. "
            f"In the great fire of {t.fire} it lost {t.houses} houses, which the people soon built again.\n\n"
            f"Today {t.population:,} people live in {n}, and many of them work in the {t.pick(_INDUSTRIES, 'en')} mills. "
            f"The town hall, completed in {t.hall}, houses a library of {t.books:,} books. The motto of the town is "
            f"“{t.motto('en')}”. Each {t.month('en')} there is a market that lasts {t.days} days.")


def retold(t: Town, language: str, style: str = "clearer") -> str:
    """Return the same in other words."""
    n, r, f, o = (name.told(language) for name in (t.name, t.river, t.founder, t.origin))
    if language == "ko":
        parts = [f"{r}강 옆에 자리한 {n}의 역사는 {t.year}년으로 거슬러 올라간다. {o}에서 온 {t.pick(_TRADES, 'ko')}였던 {f}이 "
                 "터를 잡은 해이다.",
                 f"{t.fire}년에는 불이 나서 {t.houses}채의 집을 잃었지만, 사람들은 오래지 않아 다시 일어섰다.",
                 f"지금 인구는 {t.population:,}명이고 {t.pick(_INDUSTRIES, 'ko')} 산업이 주된 일터이다.",
                 f"시청은 {t.hall}년에 문을 열었으며, 그 안의 도서관은 {t.books:,}권을 소장한다.",
                 f"“{t.motto('ko')}”라는 말이 이 도시를 대표한다. {t.month('ko')}마다 열리는 장은 {t.days}일간 이어진다."]
    else:
        parts = [f"Beside the river {r} stands a town called {n}. Its history goes back to {t.year}, when a "
                 f"{t.pick(_TRADES, 'en')} named {f} came from {o} and settled there.",
                 f"A fire destroyed {t.houses} of its houses in {t.fire}; before long they were standing again.",
                 f"At present the population is {t.population:,}, and {t.pick(_INDUSTRIES, 'en')} is what many of them "
                 "make for a living.",
                 f"Since {t.hall} there has been a town hall, in which readers find {t.books:,} books.",
                 f"“{t.motto('en')}” is what the town says of itself, and the market held every {t.month('en')} goes on "
                 f"for {t.days} days."]
    if style == "dialogue":
        asking = (("What is known about this place?", "And what happened to it later?", "How do people live there now?",
                   "Is there something worth a visit?", "What else is told of it?") if language == "en" else
                  ("이곳에 대해 무엇이 알려져 있나요?", "그 뒤에 무슨 일이 있었나요?", "지금은 사람들이 어떻게 사나요?",
                   "가 볼 만한 곳이 있나요?", "또 무엇이 전해지나요?"))
        return "\n".join(f"A: {question}\nB: {part}" for question, part in zip(asking, parts, strict=True))
    if style == "encyclopedic":
        return f"{parts[0]} {parts[2]} {parts[3]}\n\n{parts[1]} {parts[4]}"
    return f"{parts[0]} {parts[1]}\n\n{' '.join(parts[2:])}"


def pairs(t: Town, language: str) -> list[tuple[str, str]]:
    """Return questions about a town with their answers."""
    n, r, f, o = (name.told(language) for name in (t.name, t.river, t.founder, t.origin))
    if language == "ko":
        return [(f"{n}을 세운 사람은 누구인가?", f), (f"{n}은 어느 강을 끼고 있는가?", f"{r}강"),
                (f"{f}의 출신지는 어디인가?", o), (f"{n}의 시청은 몇 년에 완공되었는가?", f"{t.hall}년"),
                (f"{n}의 표어는 무엇인가?", t.motto("ko")), (f"오늘날 {n}의 주민은 몇 명인가?", f"{t.population:,}명")]
    return [(f"Who founded {n}?", f), (f"On which river does {n} lie?", r), (f"Where did {f} come from?", o),
            (f"When was the town hall of {n} completed?", str(t.hall)), (f"What is the motto of {n}?", t.motto("en")),
            (f"How many people live in {n} today?", f"{t.population:,}")]


def facts(t: Town, language: str) -> list[tuple[str, str, str, str]]:
    """Return facts with the sentences of the document that state them."""
    n, r, f, o = (name.told(language) for name in (t.name, t.river, t.founder, t.origin))
    sentences = [s for part in document(t, language).split("\n\n") for s in part.replace(". ", ".\n").split("\n")]
    first, second = sentences[0], sentences[1]
    if language == "ko":
        return [(n, "끼고 있는 강", r, first), (f, "출신지", o, second)]
    return [(n, "lies on the river", r, first), (f, "came from", o, second)]
