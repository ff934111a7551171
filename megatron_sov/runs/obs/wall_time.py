"""Where a run's wall time went, from its own events: what moved the model forward, and what did not.

Every moment from the first start to the end falls into one category:

- productive: optimizer steps that are part of the model;
- lost: steps that were done again after a restart, taken back or refused, and the step in which
  a run stood still;
- evaluation: held-out loss, needles, gates;
- saving: training stood still for a checkpoint;
- start-up: from the start of the process to its first step, with what it loads;
- waiting: from the last sign of life of one attempt to the start of the next one.

Only the loop's own events mark time.  The stretch between two of them belongs to the later one; a
`checkpoint` says itself for how long it held training up (`stall_s`), and that much is taken from the
stretches behind its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sov.runs.obs.figures import number, whole_number
from megatron_sov.runs.obs.validation import VALIDATION

CATEGORIES = {"productive": "productive steps", "lost": "lost steps", "evaluation": "evaluation",
              "saving": "saving", "startup": "start-up", "waiting": "between attempts"}
"""Category -> what people call it."""
EVALUATIONS = ("expert_load", "data_consumed", "needle", "gate", "decontamination", VALIDATION)
"""What the loop writes about an evaluation; `eval` itself is left out, since it may be added to
a run at any time."""
MARKS = ("run_start", "step", "skip", "checkpoint", "rollback", "hang", "restart", "stop", "run_end",
         *EVALUATIONS)
"""Events that mark time; others may come at any moment."""


@dataclass(frozen=True)
class WallTime:
    """A run's wall time by category."""

    began_s: float
    """Unix time of the first start."""
    spent_s: dict[str, float]
    """Category -> seconds; they add up to the wall time."""

    @property
    def total_s(self) -> float:
        """Wall time, pauses included."""
        return sum(self.spent_s.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time that moved the model forward; NaN without any."""
        return self.spent_s["productive"] / self.total_s if self.total_s > 0 else math.nan


@dataclass(slots=True)
class _TimeMark:
    kind: str
    time_s: float
    step: int
    value: float
    """run_start: when its process began; step: step_time_s; checkpoint: stall_s; rollback:
    the step returned to."""
    limit: float = math.inf
    """Last step that is still part of the model, as seen from here."""


class Timekeeper:
    """Collects a run's events one by one, and says at any time where the time went."""

    def __init__(self) -> None:
        self._marks: list[_TimeMark] = []
        self._over = False

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in, in the order of the log."""
        kind = event["event"]
        time_s = number(event.get("time_s"))
        if kind not in MARKS or not math.isfinite(time_s) or event.get("when") == "eval":
            return
        if self._over and kind != "run_start" and event.get("when") != "after":
            return  # not the run's work; it may come days later
        self._over = kind == "run_end" or (self._over and kind != "run_start")
        if self._marks:
            # clocks of two hosts differ; time does not run backwards
            time_s = max(time_s, self._marks[-1].time_s)
        step = event.get("resumed_from" if kind == "run_start" else "step") or 0
        field = {"run_start": "began_s", "step": "step_time_s", "checkpoint": "stall_s",
                 "rollback": "back_to"}.get(kind, "")
        value = number(event.get(field))
        otherwise = time_s if kind == "run_start" else 0.0
        self._marks.append(_TimeMark(kind, time_s, whole_number(step),
                                     value if math.isfinite(value) else otherwise))

    def account(self, now_s: float | None = None, waits: bool = False) -> WallTime | None:
        """Return where the time went, or None before the first start.

        Args:
            now_s: Unix time up to which the run lives or waits; None: it ended with its last event.
            waits: it does not live, but another attempt is to come.  Of a run that does not live nothing is
                left of the steps after its last checkpoint.
        """
        starts = [i for i, mark in enumerate(self._marks) if mark.kind == "run_start"]
        if not starts:
            return None
        marks = self._marks[starts[0]:]
        _find_limits(marks, ended=now_s is None or waits)
        account = _Account(marks)
        for i, mark in enumerate(marks):
            account.pass_to(i, mark)
        if now_s is not None:
            account.go_on(max(now_s, marks[-1].time_s), waits)
        return WallTime(account.began_s, account.spent_s)


def _find_limits(marks: list[_TimeMark], ended: bool) -> None:
    """Write into every mark up to which step the work before it has stayed; the later marks decide."""
    limit = math.inf
    if ended and marks[-1].kind != "run_end":
        start = max(i for i, mark in enumerate(marks) if mark.kind == "run_start")
        limit = max(mark.step for mark in marks[start:] if mark.kind in ("checkpoint", "run_start"))
    for mark in reversed(marks):
        mark.limit = limit
        if mark.kind in ("run_start", "rollback"):
            limit = min(limit, mark.step if mark.kind == "run_start" else mark.value)


class _Account:
    """Walks along the marks and books every stretch."""

    def __init__(self, marks: list[_TimeMark]) -> None:
        first = marks[0]
        self.spent_s = dict.fromkeys(CATEGORIES, 0.0)
        self.began_s = self._at_s = min(first.value, first.time_s)
        self._step, self._stepped, self._step_time_s = first.step, False, 0.0
        self._ended = False
        self._owed: list[tuple[int, float]] = []
        """(step, seconds) of the attempt's checkpoints that training stood still for and that
        are not booked yet."""
        self._marks = marks

    def pass_to(self, i: int, mark: _TimeMark) -> None:
        """Book the stretch up to a mark."""
        stretch_s, self._at_s, before_s = mark.time_s - self._at_s, mark.time_s, self._at_s
        if mark.kind == "run_start":
            # nobody worked until this attempt's process began (`value`); clocks may disagree,
            # so not longer than the stretch
            idle_s = 0.0 if i == 0 else min(stretch_s, max(0.0, mark.value - before_s))
            self._book("waiting", idle_s)
            self._book("startup", stretch_s - idle_s)
            self._step, self._stepped, self._ended = mark.step, False, False
            self._owed = self._stalls(i)
        elif mark.kind == "restart" or self._ended:
            # the processes were gone; what is measured on a run after its end is no training
            self._book("evaluation" if mark.kind == "needle" else "waiting", stretch_s)
        else:
            booking: Callable[[_TimeMark, float], None] = {"step": self._book_steps,
                                                           "checkpoint": self._book_checkpoint}.get(
                    mark.kind, self._book_other)
            booking(mark, stretch_s)
            self._ended = mark.kind in ("stop", "run_end", "hang")

    def go_on(self, now_s: float, waits: bool) -> None:
        """Book the time since the last mark of a run that lives or waits."""
        kind = "productive" if self._stepped else "startup"
        self._book("waiting" if waits or self._ended else kind, now_s - self._at_s)

    def _stalls(self, start: int) -> list[tuple[int, float]]:
        # Its event tells what a checkpoint held up, and comes when it is on disk, steps later:
        # so looked for ahead.
        found = []
        for mark in self._marks[start + 1:]:
            if mark.kind == "run_start":
                break
            if mark.kind == "checkpoint" and mark.value > 0:
                found.append((mark.step, mark.value))
        return found

    def _book_steps(self, mark: _TimeMark, stretch_s: float) -> None:
        """Book a stretch that ends with a step: the steps since the last mark, and what they waited for."""
        num_steps = max(1, mark.step - self._step)
        self._step_time_s = mark.value
        computing_s = min(stretch_s, num_steps * mark.value)
        if not self._stepped:
            # before an attempt's first step: loading, compiling, filling caches
            self._book("startup", stretch_s - computing_s)
            stretch_s = computing_s
        # what is longer than the steps themselves was a checkpoint, as far as one held training up;
        # the rest is the loop's own
        stretch_s -= self._book_saving(stretch_s - computing_s, mark.step)
        self._book_computing(mark, stretch_s, num_steps)
        self._step, self._stepped = mark.step, True

    def _book_computing(self, mark: _TimeMark, stretch_s: float, num_steps: int) -> None:
        """Book steps as productive or lost: where a restart cut into the steps of one
        event, by their number."""
        kept = min(max(mark.limit - self._step, 0), num_steps)
        self._book("productive", stretch_s * kept / num_steps)
        self._book("lost", stretch_s * (num_steps - kept) / num_steps)

    def _book_checkpoint(self, mark: _TimeMark, stretch_s: float) -> None:
        """Book a stretch that ends with a checkpoint: as much as it held up is saving,
        the rest belongs to steps."""
        stretch_s -= self._book_saving(stretch_s, mark.step + 1)
        # what had no room before its own event is given up: it would be taken from steps that
        # it did not hold up
        self._owed = [(step, seconds) for step, seconds in self._owed if step != mark.step]
        self._book_rest(mark, stretch_s)

    def _book_other(self, mark: _TimeMark, stretch_s: float) -> None:
        """Book a stretch that ends with an evaluation, a refusal, a roll-back, a hang or the end."""
        if mark.kind in EVALUATIONS:
            # with log_every_steps > 1 steps were done since the last event; they took about as
            # long as those before
            unlogged_s = min(stretch_s, max(0, mark.step - self._step) * self._step_time_s)
            if unlogged_s:
                self._book_computing(mark, unlogged_s, mark.step - self._step)
                self._step = mark.step
            self._book("evaluation", stretch_s - unlogged_s)
        elif mark.kind in ("skip", "rollback", "hang"):
            # computed, or stood still, and not part of the model
            self._book("lost", stretch_s)
            self._step = max(self._step, mark.step)
        else:
            self._book_rest(mark, stretch_s)

    def _book_rest(self, mark: _TimeMark, stretch_s: float) -> None:
        """Book what is left between steps, with the step before it."""
        self._book("productive" if mark.limit >= self._step else "lost", stretch_s)

    def _book_saving(self, room_s: float, before_step: int) -> float:
        """Book what checkpoints of earlier steps held up, as far as there is room;
        returns the seconds booked."""
        booked_s = 0.0
        left: list[tuple[int, float]] = []
        for step, seconds in self._owed:
            here_s = min(seconds, max(0.0, room_s - booked_s)) if step < before_step else 0.0
            booked_s += here_s
            if seconds > here_s:
                left.append((step, seconds - here_s))
        self._owed = left
        self._book("saving", booked_s)
        return booked_s

    def _book(self, category: str, seconds: float) -> None:
        self.spent_s[category] += seconds
