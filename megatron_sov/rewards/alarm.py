"""When a second opinion says that the first verifier is being fooled: Page's test over the disagreements."""

from __future__ import annotations

import math
from dataclasses import dataclass

LIKELY, SURE = 0.8416212335729143, 1.6448536269514722
"""Quantiles of the normal distribution: one-sided 80 % and 95 %."""
LEAST_USUAL = 0.01
"""Share that is taken for the usual one where the first opinions show less."""


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
        """Take in the next opinion."""
        self.seen += 1
        self.paid += paid_wrongly
        if self.alarm is not None:
            return
        if self.seen <= self.num_first:
            if self.seen == self.num_first:
                self._begin()
            return
        more = min(self._usual + self.rise, 0.99)
        ratio = more / self._usual if paid_wrongly else (1 - more) / (1 - self._usual)
        if self._height <= 0:
            self._since, self._paid_since = self.seen, 0
        self._paid_since += paid_wrongly
        self._height = max(0.0, self._height + math.log(ratio))
        if self._height >= math.log(self.run_length):
            share = self._paid_since / (self.seen - self._since + 1)
            self.alarm = Alarm(self.seen, self._first_share, share, self._since)

    def _begin(self) -> None:
        """Take a share for the usual one that is rather too large than too small."""
        self._first_share = self.paid / self.seen
        self._usual = min(max(_bounds(self.paid, self.seen, LIKELY)[1], LEAST_USUAL), 0.98)
        if _bounds(self.paid, self.seen, SURE)[0] > self.limit:
            self.alarm = Alarm(self.seen, self._first_share, self._first_share, 1)


def _bounds(count: int, seen: int, quantile: float) -> tuple[float, float]:
    """Return Wilson's bounds of a share, each for one side."""
    z2, share = quantile**2, count / seen
    middle = share + z2 / (2 * seen)
    half = math.sqrt(z2 * (share * (1 - share) / seen + z2 / (4 * seen**2)))
    return (middle - half) / (1 + z2 / seen), (middle + half) / (1 + z2 / seen)
