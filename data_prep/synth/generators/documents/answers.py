"""Short answers: whether two of them are the same one, and whether a document has one, word for word."""

from __future__ import annotations

import re

from data_prep.synth.generators.documents.numbers import numbers_of, without_numbers
from megatron_sov.base.documents.overlap import fold
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
        before, behind = text[place - 1:place], text[place + len(wanted):][:2]
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
    if edge.isdigit() or neighbour.isdigit():
        return edge.isdigit() and neighbour.isdigit()
    if _UNSPACED.match(edge) or _UNSPACED.match(neighbour):
        return False
    is_hangul = "가" <= edge <= "힣"
    return not (is_behind and is_hangul)
