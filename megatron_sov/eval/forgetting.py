"""The verdict of a forgetting gate: whether training has cost a model what it could do before.

The rule, for the first figure of each task: the model has forgotten where the whole 90 % interval of the
paired difference lies below -tolerance, a one-sided test of 5 % that the loss is no larger than tolerated.
What the items cannot tell is not held against the model, but it is said: "not proven".  No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sov.eval.score_differences import Difference, Scored, differences

CONFIDENCE = 0.90
"""Of the two-sided interval; 5 % lie on either side."""
KEPT, NOT_PROVEN, FORGOTTEN, NOT_KNOWN = "kept", "not proven", "forgotten", "not known"


@dataclass(frozen=True)
class TaskVerdict:
    """What was found on one task."""

    difference: Difference
    """Of its first figure."""
    tolerance: float
    """How much worse it may be, in the figure's own unit."""

    @property
    def word(self) -> str:
        """`kept`: the loss is below the tolerance for sure; `forgotten`: above it for sure; `not proven`:
        items do not tell; `not known`: there is no figure, which does not pass."""
        interval = self.difference.interval
        if interval is None:
            return NOT_KNOWN
        low, high = interval if self.difference.higher_is_better else (-interval[1], -interval[0])
        return FORGOTTEN if high < -self.tolerance else KEPT if low >= -self.tolerance else NOT_PROVEN

    def line(self) -> str:
        d = self.difference
        figures = (f"{d.before:.4f} to {d.after:.4f}" if d.before is not None and d.after is not None
                   else "a figure is missing")
        interval = f"no interval: {d.note}"
        if d.interval is not None and d.value is not None:
            interval = (f"difference {d.value:+.4f}, 90 % interval {d.interval[0]:+.4f} to "
                        f"{d.interval[1]:+.4f} over {d.items:,} items"
                        + (f" ({d.left_out:,} left out)" if d.left_out else ""))
        return f"{d.task}, {d.metric}: {self.word}; {figures}, {interval}; tolerance {self.tolerance:g}"

    def fields(self) -> dict[str, Any]:
        """Return plain values for the event."""
        return {**self.difference.fields(), "verdict": self.word}


@dataclass(frozen=True)
class Forgetting:
    """The verdict over all tasks."""

    tasks: tuple[TaskVerdict, ...]
    """In the order in which they were named."""
    tolerance: float
    """Of each."""

    @property
    def passed(self) -> bool:
        """Whether no task is forgotten, and each has a figure."""
        return all(task.word in (KEPT, NOT_PROVEN) for task in self.tasks)

    def lines(self, *words: str) -> list[str]:
        """Return the lines of the tasks whose verdict is one of `words`; of all without words."""
        return [task.line() for task in self.tasks if not words or task.word in words]

    def fields(self) -> dict[str, Any]:
        """Return plain values for the event and the completion manifest."""
        return {"passed": self.passed, "tolerance": self.tolerance, "confidence": CONFIDENCE,
                "tasks": [task.fields() for task in self.tasks]}


def judge(start: Scored, last: Scored, tolerance: float) -> Forgetting:
    """Return whether the last model has forgotten what the start could do.

    Args:
        start: results of the model that training began with.
        last: of the one that it made.
        tolerance: how much worse a task's first figure may be.

    Raises:
        UserError: the two cannot be compared.
    """
    # a group's figure has no items of its own, and its tasks are judged
    judged = [name for name, task in start.results.tasks.items()
              if not task.items or start.items[name] or last.items.get(name)]
    found = differences(start, last, judged, CONFIDENCE)
    firsts = {d.task: d for d in reversed(found)}
    names = dict.fromkeys(d.task for d in found)
    return Forgetting(tuple(TaskVerdict(firsts[name], tolerance) for name in names), tolerance)
