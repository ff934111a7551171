"""Verdicts that several generators need: equal answers, copied text, grades of the judge."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from data_prep.synth.generator import Ask, GeneratedSample, SampleVerdict
from data_prep.synth.generators.documents.numbers import numbers_of, without_numbers
from data_prep.synth.replies import NoUsableReply
from megatron_sov.base.documents.overlap import find_units, fold
from megatron_sov.base.documents.scripts import OF_RUNS, in_brackets
from megatron_sov.judge.rewards.answers import final_answer, normalized

_PARTICLE = re.compile(
    r"(?<=[가-힣0-9a-z)])(?:입니다|이었습니다|였습니다|이에요|예요|이었다|였다|이다|에서|에게|으로|이라고|라고|까지|부터|은|는|이|가"
    r"|을|를|의|에|로|와|과|도)$|(?:ครับ|ค่ะ|です|でした|である)$")
_BRACKETS = re.compile(r"\s*[(（\[][^()（）\[\]]{0,80}[)）\]]")
_UNSPACED = re.compile(f"[{in_brackets(OF_RUNS)}]")


def answer_in(reply: str) -> str:
    """Return the final answer of a reply; all of it where it marks none."""
    return (final_answer(reply) or reply).strip()


def same_answer(given: str, expected: str, language: str) -> bool:
    """Return whether two short answers are the same but for case, articles, brackets, blanks, and what
    Korean, Thai and Japanese hang on a word; numbers are compared by value."""
    one, other = _bare(given), _bare(expected)
    if not one or not other:
        return False
    if one == other:
        return True
    numbers, others = numbers_of(given, language), numbers_of(expected, language)
    rest, rest_of_other = (re.sub(r"\W", "", _bare(without_numbers(text, language)))
                           for text in (given, expected))
    return bool(numbers.stated) and numbers.stated == others.stated and rest == rest_of_other


def _bare(text: str) -> str:
    """Return an answer without what does not tell it from another one."""
    found = normalized(_BRACKETS.sub(" ", text) if _BRACKETS.sub("", text).strip() else text)
    # particles follow each other, as in 에서는
    shorter = _PARTICLE.sub("", found)
    while shorter and shorter != found:
        found, shorter = shorter, _PARTICLE.sub("", shorter)
    return re.sub(r"\s", "", found)


def stands_in(answer: str, document: str) -> bool:
    """Return whether a document has an answer word for word; no part of another word or number is one.

    Words go on behind a Korean one, as particles do, and on both sides of those of scripts without blanks.
    """
    wanted, text = " ".join(normalized(answer).split()), " ".join(fold(document).split())
    if not wanted:
        return False
    place = text.find(wanted)
    while place >= 0:
        # at place 0 the first slice is empty, as it should be
        before, behind = text[place - 1:place], text[place + len(wanted):][:2]
        # 3 is not in 3.5
        ends = not _continues(behind[:1], wanted[-1], True) and not (
            wanted[-1].isdigit() and re.match(r"[.,]\d", behind))
        if ends and not _continues(before, wanted[0], False):
            return True
        place = text.find(wanted, place + 1)
    return False


def _continues(neighbour: str, edge: str, is_behind: bool) -> bool:
    """Return whether a character beside an edge of a word belongs to the same word."""
    if not neighbour or not neighbour.isalnum() or not edge.isalnum():
        return False
    # a unit may touch its number: 5kg has a 5
    if edge.isdigit() or neighbour.isdigit():
        return edge.isdigit() and neighbour.isdigit()
    if _UNSPACED.match(edge) or _UNSPACED.match(neighbour):
        return False
    is_hangul = "가" <= edge <= "힣"
    return not (is_behind and is_hangul)


def graded(ask: Ask, check: str, rubric: str, material: Mapping[str, str], least: float) -> SampleVerdict:
    """Return whether the judge gives a grade from 0 to 10 of at least so much; no grade is too little."""
    try:
        grade = ask.judge(rubric, material)
    except NoUsableReply as e:
        return SampleVerdict(f"judge: {check}", False, str(e))
    return SampleVerdict(f"judge: {check}", grade >= least, f"grade {grade:g}, at least {least:g}")


SAME = ("ANSWER and EXPECTED were both given to QUESTION. Do they say the same? 10: in substance the same "
        "answer; 0: another answer, a part of it only, more than it with something wrong, or none.")
UNKNOWN = "unknown"
"""What a solver says who cannot answer."""


def agreed(ask: Ask, check: str, question: str, given: str, expected: str, language: str, least: float
           ) -> SampleVerdict:
    """Return whether a solver's answer is the expected one: word for word, else, where `least` is not 0, by
    the judge."""
    # a judge is paid, and is asked where words differ
    if same_answer(given, expected, language):
        return SampleVerdict(check, True, "the same")
    if not least or normalized(given) in ("", UNKNOWN):
        return SampleVerdict(check, False, f"answered {given[:80]!r}, expected {expected[:80]!r}")
    return graded(ask, check, SAME, {"question": question, "answer": given, "expected": expected}, least)


def copied_share(made: str, source: str, words: int) -> float:
    """Return the share of a text's runs of so many words that stand in another one; 0 for a shorter text."""
    runs = find_units(made).runs(words)
    return float(np.isin(runs, find_units(source).runs(words)).mean()) if len(runs) else 0.0


def size_ratio(made: str, source: str) -> float:
    """Return how long a text is, in words, for each word of another one."""
    return find_units(made).size / max(find_units(source).size, 1)


MAX_TOLD_CHARS, MAX_KEPT_CHARS = 200, 2000
"""Of an input that nothing is asked about, and of an answer in another form than the prompt asks for."""


def refused(source: str, check: str, detail: str) -> GeneratedSample:
    """Return the sample of an input about which nothing is asked."""
    return GeneratedSample({"text": source[:MAX_TOLD_CHARS]}, (SampleVerdict(check, False, detail),))


def unknown_language(source: str) -> GeneratedSample:
    """Return the sample of a document in no language that is known."""
    return refused(source, "source language", "not sure, or none")
