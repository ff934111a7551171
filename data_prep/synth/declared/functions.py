"""Functions that prompts and values may call, and checks that steps name.

A function returns a value and asks no model. A check returns verdicts; `Judging` gives it the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex
import yaml

from data_prep.curate.decontamination.step import DecontaminateSettings, find_hits
from data_prep.curate.quality.identify import identify
from data_prep.synth.declared.programs import run_programs
from data_prep.synth.final_answers import boxes, check as check_answers, ends_in_box
from data_prep.synth.generator import Ask, SampleVerdict
from data_prep.synth.generators.documents.facts import fact_verdicts, kept_share
from data_prep.synth.generators.documents.languages import customs_of, in_language, name_of
from data_prep.synth.generators.documents.pieces import fenced
from data_prep.synth.generators.documents.verdicts import (
    agreed, answer_in, copied_share, letters_likeness, read_list, size_ratio, stands_in)
from megatron_sov.judge.rewards.answers import normalized

REFUSALS = Path(__file__).parents[1] / "generators/refusals.yaml"
BEGINNING_CHARS = 240
"""A refusal comes first; what stands further on may quote one."""
TIMEOUT_S = 2.0
MIN_LANGUAGE_SCORE = 0.5


class Answer(str):
    """The text of a reply, with what else a step may look at."""

    cut: bool = False
    """Whether it ended at the limit of tokens."""
    thinking: str = ""

    @classmethod
    def of(cls, text: str, cut: bool, thinking: str) -> Answer:
        made = cls(text)
        made.cut, made.thinking = cut, thinking
        return made


def matches(text: str, pattern: str) -> str:
    """Return the first place of a text that a regular expression fits, or ""."""
    found = regex.search(pattern, text, regex.IGNORECASE, timeout=TIMEOUT_S)
    return found[0] if found else ""


def without(text: str, pattern: str) -> str:
    """Return a text without what a regular expression fits."""
    return str(regex.sub(pattern, "", text, timeout=TIMEOUT_S))


def sections(text: str) -> list[str]:
    """Return the texts below the headings of a Markdown text that begin with `## `."""
    return [part.strip() for part in regex.split(r"(?m)^## \S.*$", text)[1:]]


def tagged_list(text: str, *names: str) -> list[dict[str, str]]:
    """Return the groups of tags in a part of a reply; none where it has another form."""
    return read_list(text, *names) or []


@lru_cache(maxsize=1)
def _refusals() -> dict[str, list[regex.Pattern[str]]]:
    listed = yaml.safe_load(REFUSALS.read_text(encoding="utf-8"))
    return {language: [regex.compile(pattern, regex.IGNORECASE) for pattern in patterns]
            for language, patterns in listed.items()}


def languages_with_refusals() -> frozenset[str]:
    return frozenset(_refusals())


def refuses(answer: str, language: str) -> bool:
    """Return whether an answer begins with a refusal in a language, or in English, which models fall back
    to."""
    # cut twice: a long answer costs no time, and blanks do not use up the beginning
    beginning = " ".join(answer[:2 * BEGINNING_CHARS].replace("’", "'").split())[:BEGINNING_CHARS]
    known = _refusals()
    return any(pattern.search(beginning, timeout=TIMEOUT_S)
               for name in dict.fromkeys((language, "en")) for pattern in known.get(name, ()))


def language_of(text: str) -> str:
    """Return the language that a text reads as, as an ISO 639-1 code."""
    return identify(text)[0]


def reads_as(text: str, language: str) -> bool:
    """Return whether a text is surely in a language."""
    found, score = identify(text)
    return found == language and score >= MIN_LANGUAGE_SCORE


def likeness(text: str, others: Iterable[str]) -> float:
    """Return how much a short text is like the one of others that it is most like, from 0 to 1."""
    return max((letters_likeness(text, other) for other in others), default=0.0)


def pronouns(language: str) -> Iterable[str]:
    """Return the words of a language that stand for a name."""
    return customs_of(language).pronouns


def final_answers(replies: str | Sequence[str]) -> list[str]:
    """Return the final answers of replies that were not cut off and end with one in a box."""
    listed = [replies] if isinstance(replies, str) else replies
    return [boxes(reply)[0] for reply in listed if not getattr(reply, "cut", False) and ends_in_box(reply)]


def boxed_or_plain(text: str) -> str:
    """Return what stands in the last box of a short answer, else the answer without marks around it."""
    text = text.strip().strip("*").strip()
    return (boxes(text) or [text.rstrip(".").strip("$").strip()])[0]


def count_right(answers: Sequence[str], wanted: str, choices: Sequence[str] = (), way: Any = "auto") -> int:
    """Return how many final answers are the wanted one, by the rewards `math` and `stem`."""
    return sum(checked.right for checked in check_answers(list(answers), wanted, choices, way))


def in_benchmarks(text: str, benchmarks: Sequence[str]) -> str:
    """Return the benchmark and item that a text shares ten words in a row with, or ""."""
    if not benchmarks:
        return ""
    hits = find_hits(text, _search(tuple(benchmarks)), 0)
    return f"{hits[0].benchmark}:{hits[0].item}" if hits else ""


@lru_cache(maxsize=4)
def _search(benchmarks: tuple[str, ...]) -> Any:
    return DecontaminateSettings(benchmarks=tuple(map(Path, benchmarks))).search()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "answer_in": answer_in, "boxed_or_plain": boxed_or_plain, "copied_share": copied_share,
    "count_right": count_right, "fenced": fenced, "final_answers": final_answers,
    "in_benchmarks": in_benchmarks, "kept_share": kept_share, "language_name": name_of,
    "language_of": language_of, "likeness": likeness, "matches": matches, "normalized": normalized,
    "pronouns": pronouns, "reads_as": reads_as, "refuses": refuses, "run_programs": run_programs,
    "sections": sections,
    "size_ratio": size_ratio, "stands_in": stands_in, "tagged_list": tagged_list, "without": without}
"""Name in a template -> function."""


@dataclass(frozen=True)
class Judging:
    """What a check is given besides its arguments."""

    ask: Ask
    name: str
    """Of the verdict."""


def check_language(judging: Judging, text: str, language: str) -> Iterator[SampleVerdict]:
    """A text is in a language; names and terms in Latin letters may stand in it."""
    yield in_language(text, language)


def check_facts(judging: Judging, text: str, source: str, language: str, source_language: str
                ) -> Iterator[SampleVerdict]:
    """All numbers, names and quoted strings of a text stand in its source."""
    yield from fact_verdicts(text, source, language, source_language)


def check_within(judging: Judging, value: float | None, least: float = 0.0, most: float = 1.0
                 ) -> Iterator[SampleVerdict]:
    """A number lies between two others; none passes."""
    passed = value is None or least <= value <= most
    detail = "" if value is None else f"{value:.2f}, must lie from {least:g} to {most:g}"
    yield SampleVerdict(judging.name, passed, detail)


def check_agreed(judging: Judging, question: str, given: str, expected: str, language: str, least: float
                 ) -> Iterator[SampleVerdict]:
    """A solver's answer is the expected one: word for word, else by the judge where `least` is not 0."""
    yield agreed(judging.ask, judging.name, question, given, expected, language, least)


def check_dialogue(judging: Judging, text: str, min_turns: int = 4) -> Iterator[SampleVerdict]:
    """Each line is a turn of A or B, who alternate."""
    turns = [regex.fullmatch(r"([AB]): \S.*", line) for line in text.split("\n") if line.strip()]
    speakers = [turn[1] for turn in turns if turn]
    if len(speakers) < len(turns):
        yield SampleVerdict(judging.name, False, "a line is no turn of A or B")
        return
    passed = len(speakers) >= min_turns and all(
        speaker == "AB"[number % 2] for number, speaker in enumerate(speakers))
    yield SampleVerdict(judging.name, passed, f"{len(speakers)} turns of {''.join(speakers)[:40]}")


CHECKS: Mapping[str, Callable[..., Iterator[SampleVerdict]]] = {
    "agreed": check_agreed, "dialogue": check_dialogue, "facts": check_facts, "language": check_language,
    "within": check_within}
"""Name in a step -> check."""
