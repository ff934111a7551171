"""Constraints that a script can write functions for, keep and break: what scripted models of AutoIF know.

A text is written about a topic; keeping and breaking a rule take the topic and a number that makes it one of
its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

SENTENCE = "{topic}에 대한 이야기입니다. 사람들은 이것을 오래전부터 알고 있었고 지금도 자주 찾습니다."
"""Korean without digits, commas, quotation marks or line ends."""
NUMERALS = "영일이삼사오육칠팔구"


def named(number: int) -> str:
    """Return a number in Korean numerals: letters that tell texts apart and no digit."""
    return "".join(NUMERALS[int(digit)] for digit in str(number))


def plain(topic: str, number: int) -> str:
    """Return an ordinary text about a topic."""
    return SENTENCE.format(topic=topic) + f" 이것은 {named(number)}번째 글입니다."


Writing = Callable[[str, int], str]
"""Topic and number -> a text."""


@dataclass(frozen=True)
class Rule:
    """One constraint."""

    text: str
    """As the model that invents constraints writes it."""
    body: str
    """What its function returns, an expression over `response`."""
    back: str
    """What the function asks for, in other words."""
    keeping: Writing
    """Writes a text that keeps it."""
    breaking: Writing
    """Writes one that does not."""


def _around(before: str, after: str) -> Writing:
    return lambda topic, number: before + plain(topic, number) + after


def rules() -> Iterator[Rule]:
    """Yield different rules."""
    for word in ("이유", "여름", "바다", "시장", "기차", "사과", "나무", "학교"):
        for times in (1, 2, 3):
            yield Rule(f'Use the word "{word}" at least {times} times.',
                       f"response.count({word!r}) >= {times}",
                       f'The word "{word}" must occur {times} times or more.',
                       _around("", f" {word}" * times), _around("", f" {word}" * (times - 1)))
    for sign in (",", ";", "!", "?", "#", "@"):
        yield Rule(f'Do not use the sign "{sign}".', f"{sign!r} not in response",
                   f'The sign "{sign}" must not occur.', plain, _around("", f" 그리고{sign} 더 있습니다."))
    for end in ("이상입니다.", "[END]", "감사합니다!", "-끝-"):
        yield Rule(f'End the answer with "{end}".', f"response.rstrip().endswith({end!r})",
                   f'The last words must be "{end}".', _around("", f" {end}"), _around(f"{end} ", ""))
