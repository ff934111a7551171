"""What a second opinion said of judged rows: how often the two disagree, since when, on which answers."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.rewards.alarm import Alarm, DisagreementAlarm
from megatron_sov.rewards.composed import SECOND

MAX_EXAMPLES = 500
"""Answers of each kind that are compared with one another, the newest ones."""
TAIL_CHARS = 4000
"""Of an answer's end that is compared: there stands what a verifier reads."""
MAX_WORDS = 4
"""Of a string that may give the answers away."""
MIN_SHARE = 0.2
"""Of the wrongly paid answers that have such a string."""
MAX_STRINGS = 8


@dataclass(frozen=True)
class Opinion:
    """Two judgements of one answer."""

    line: int
    """Of the file."""
    first: float
    second: float
    disagrees: bool
    response: str

    @property
    def paid_wrongly(self) -> bool:
        """Whether the first verifier gives more than the second one would: what an exploit lives on."""
        return self.disagrees and self.first > self.second


@dataclass(frozen=True)
class TellingString:
    """Words that stand in wrongly paid answers more often than in others."""

    text: str
    share_paid: float
    """Of wrongly paid answers that have it."""
    share_other: float
    """Of all others."""


@dataclass
class Opinions:
    """All opinions of a file, in bounded memory."""

    num_opinions: int = 0
    disagreeing: list[int] = field(default_factory=list)
    """Lines where the two disagree."""
    paid_wrongly: list[int] = field(default_factory=list)
    """Lines of those that the first one gives more."""
    lines: list[int] = field(default_factory=list)
    """Of all opinions, in order."""
    alarm_line: int = 0
    """Line at which the alarm rang; 0: it did not."""
    paid: deque[Opinion] = field(default_factory=lambda: deque(maxlen=MAX_EXAMPLES))
    """Wrongly paid answers, the newest ones."""
    other: deque[Opinion] = field(default_factory=lambda: deque(maxlen=MAX_EXAMPLES))
    """Other answers, the newest ones."""
    rule: DisagreementAlarm = field(default_factory=DisagreementAlarm)

    @property
    def alarm(self) -> Alarm | None:
        """The first alarm."""
        return self.rule.alarm

    def add(self, opinion: Opinion) -> None:
        """Take in the next opinion."""
        self.num_opinions += 1
        self.lines.append(opinion.line)
        if opinion.disagrees:
            self.disagreeing.append(opinion.line)
        if opinion.paid_wrongly:
            self.paid_wrongly.append(opinion.line)
        (self.paid if opinion.paid_wrongly else self.other).append(opinion)
        rang = self.alarm is not None
        self.rule.add(opinion.paid_wrongly)
        if self.alarm is not None and not rang:
            self.alarm_line = opinion.line

    def told(self, place: str = "line") -> str:
        """Return the alarm in a sentence; empty without one.

        Args:
            place: what an opinion's `line` numbers.
        """
        alarm = self.alarm
        if alarm is None:
            return ""
        where = f"{place} {self.alarm_line}"
        if alarm.since == 1:
            return (f"already in the first {alarm.opinion:,} second opinions, up to {where}, the first "
                    f"verifier pays {alarm.share_since:.0%} that the second one would not")
        return (f"at {where}: the first verifier pays {alarm.share_since:.0%} that the second one would not, "
                f"{alarm.share_before:.0%} in the beginning; it may be fooled")

    def strings(self) -> list[TellingString]:
        """Return what gives wrongly paid answers away, the most telling first."""
        return telling_strings([o.response for o in self.paid], [o.response for o in self.other])


def read_opinions(path: Path) -> Opinions:
    """Return the opinions of a file that `score` has written; rows without a second judgement are no part."""
    found = Opinions()
    for opinion in _opinions(path):
        found.add(opinion)
    return found


def _opinions(path: Path) -> Iterator[Opinion]:
    with open(path, "rb") as f:
        for line, raw in enumerate(f, start=1):
            row = json.loads(raw)
            if opinion := opinion_of(line, row["components"], row["response"]):
                yield opinion


def opinion_of(line: int, components: Mapping[str, Any], response: str) -> Opinion | None:
    """Return the opinions of a row's result; None: it was asked for no second one, or that one failed."""
    said = components.get(SECOND)
    if not isinstance(said, Mapping) or said.get("disagrees") is None:
        return None
    return Opinion(line, said["first"], said["reward"], bool(said["disagrees"]), response[-TAIL_CHARS:])


def telling_strings(paid: Sequence[str], other: Sequence[str]) -> list[TellingString]:
    """Return strings of one to four words by how much more often they stand in the first answers."""
    counts, others = _counts(paid), _counts(other)
    shares = [TellingString(text, count / len(paid), others[text] / max(1, len(other)))
              for text, count in counts.items() if count > 1 and count >= MIN_SHARE * len(paid)]
    shares.sort(key=lambda s: (s.share_other - s.share_paid, -len(s.text), s.text))
    found: list[TellingString] = []
    for one in shares:
        if one.share_paid <= one.share_other or len(found) == MAX_STRINGS:
            break
        # a part of a longer one, which is as frequent, says nothing more
        if not any(one.text in longer.text and one.share_paid <= longer.share_paid for longer in found):
            found.append(one)
    return found


def _counts(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        words = text.split()
        counts.update({" ".join(words[i:i + n]) for n in range(1, MAX_WORDS + 1)
                       for i in range(len(words) - n + 1)})
    return counts
