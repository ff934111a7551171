"""What a second opinion said of judged rows: how often the two disagree, since when, on which
answers."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.judge.rewards.composed import SECOND

LIKELY, SURE = 0.8416212335729143, 1.6448536269514722
"""Quantiles of the normal distribution: one-sided 80 % and 95 %."""
LEAST_USUAL = 0.01
"""Share that is taken for the usual one where the first opinions show less."""
MAX_EXAMPLES = 500
"""Answers of each kind that are compared with one another, the newest ones."""
TAIL_CHARS = 4000
"""Of an answer's end that is compared: there stands what a verifier reads."""
MAX_WORDS = 4
"""Of a string that may give the answers away."""
MIN_SHARE = 0.2
"""Of the wrongly paid answers that have such a string."""
MAX_STRINGS = 8


# When a second opinion says that the first verifier is being fooled: Page's test over the disagreements.


@dataclass(frozen=True)
class Alarm:
    """What was noticed."""

    opinion: int
    """Number of the opinion at which it was noticed, from 1."""
    share_before: float
    """Of answers that the first verifier paid and the second one would not, in the first opinions."""
    share_since: float
    """The same since they began to grow; of all so far, where they were too many from the beginning."""
    since: int
    """Number of the opinion from which they grew."""


@dataclass
class DisagreementAlarm:
    """Looks at opinions in their order: how often does the first verifier pay what the stricter one does not?

    The first opinions tell how often that is so anyway.  From there on Page's cumulative sum (Biometrika 41,
    1954) compares that share with one that is larger by `rise`; it alarms at a height of log(`run_length`),
    where opinions at the usual share alarm once in no fewer than `run_length` on average (Lorden, Annals of
    Mathematical Statistics 42, 1971).  The first opinions alarm themselves where even the least share that
    they allow is above `limit`.
    """

    num_first: int = 200
    """Opinions that tell what is usual."""
    rise: float = 0.15
    """Of the share, that has to be noticed."""
    limit: float = 0.1
    """Share that is too large from the beginning."""
    run_length: float = 1e5
    """Opinions at the usual share between two alarms, on average at least."""

    def __post_init__(self) -> None:
        self.seen = self.paid = self._since = self._paid_since = 0
        self._first_share = self._usual = self._height = 0.0
        self.alarm: Alarm | None = None
        """The first one."""

    def add(self, paid_wrongly: bool) -> None:
        self.seen += 1
        self.paid += paid_wrongly
        if self.alarm is not None:
            return
        # until the usual share is known, nothing can be unusual
        if self.seen <= self.num_first:
            if self.seen == self.num_first:
                self._begin()
            return
        more = min(self._usual + self.rise, 0.99)
        # likelihood ratio of one opinion under the larger share and under the usual one
        ratio = more / self._usual if paid_wrongly else (1 - more) / (1 - self._usual)
        # the sum begins again at zero: where it left zero last, the growth began
        if self._height <= 0:
            self._since, self._paid_since = self.seen, 0
        self._paid_since += paid_wrongly
        # Page's recursion: evidence against a rise is forgotten at zero, else a long quiet time would hide
        # one
        self._height = max(0.0, self._height + math.log(ratio))
        if self._height >= math.log(self.run_length):
            share = self._paid_since / (self.seen - self._since + 1)
            self.alarm = Alarm(self.seen, self._first_share, share, self._since)

    def _begin(self) -> None:
        """Take a share for the usual one that is rather too large than too small."""
        self._first_share = self.paid / self.seen
        self._usual = min(max(_bounds(self.paid, self.seen, LIKELY)[1], LEAST_USUAL), 0.98)
        # a verifier that was fooled from the first row shows no rise later: the share itself is too large
        if _bounds(self.paid, self.seen, SURE)[0] > self.limit:
            self.alarm = Alarm(self.seen, self._first_share, self._first_share, 1)


def _bounds(count: int, seen: int, quantile: float) -> tuple[float, float]:
    """Return Wilson's bounds of a share, each for one side."""
    # Wilson (JASA 22, 1927); it holds for shares near 0, where the normal interval does not
    z2, share = quantile**2, count / seen
    middle = share + z2 / (2 * seen)
    half = math.sqrt(z2 * (share * (1 - share) / seen + z2 / (4 * seen**2)))
    return (middle - half) / (1 + z2 / seen), (middle + half) / (1 + z2 / seen)


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
    alarm_line: int = 0
    """Line at which the alarm rang; 0: it did not."""
    paid: deque[Opinion] = field(default_factory=lambda: deque(maxlen=MAX_EXAMPLES))
    """Wrongly paid answers, the newest ones."""
    other: deque[Opinion] = field(default_factory=lambda: deque(maxlen=MAX_EXAMPLES))
    """Other answers, the newest ones."""
    rule: DisagreementAlarm = field(default_factory=DisagreementAlarm)

    @property
    def alarm(self) -> Alarm | None:
        return self.rule.alarm

    def add(self, opinion: Opinion) -> None:
        self.num_opinions += 1
        if opinion.disagrees:
            self.disagreeing.append(opinion.line)
        if opinion.paid_wrongly:
            self.paid_wrongly.append(opinion.line)
        (self.paid if opinion.paid_wrongly else self.other).append(opinion)
        rang = self.alarm is not None
        # the alarm keeps no lines: which line rang it is known here alone
        self.rule.add(opinion.paid_wrongly)
        if self.alarm is not None and not rang:
            self.alarm_line = opinion.line

    def describe_alarm(self, place: str = "line") -> str:
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
    # the most telling first; among equals the longer, which says more, then the alphabet
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
        # a set for each answer: a string counts once however often an answer repeats it
        counts.update({" ".join(words[i:i + n]) for n in range(1, MAX_WORDS + 1)
                       for i in range(len(words) - n + 1)})
    return counts
