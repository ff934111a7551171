"""Whether the model behind an address is still the one whose answers are kept: it answers fixed questions,
and what it says is compared with what it said before.  Names say little: a server that is started again may
have another model under the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError

TEXTS = ("The history of the town began when", "To bake bread at home, you need",
         "The three branches of physics are", "After the rain had stopped, the children")
"""By whose likeliest continuations two models hardly ever agree; the first alone was asked once."""
_SHORT: Mapping[str, Any] = {"max_tokens": 32, "temperature": 0}
TEXT_PROBES: Sequence[Mapping[str, Any]] = tuple({"prompt": text, **_SHORT} for text in TEXTS)
"""For `/completions`."""
CHAT_PROBES: Sequence[Mapping[str, Any]] = tuple(
    {"messages": [{"role": "user", "content": f"Go on: {text}"}], **_SHORT} for text in TEXTS)
"""For `/chat/completions`."""
SCORE_PROBES: Sequence[Mapping[str, Any]] = tuple(
    {"messages": [{"role": "user", "content": "Tell me of the town."},
                  {"role": "assistant", "content": text}]} for text in TEXTS)
"""For reward models."""
ASKED_AGAIN = 3
"""How often before a question counts as answered otherwise: in another batch a near tie falls otherwise."""
OTHER_FROM = 0.5
"""Share of the questions from which on another model answers; less is another version of an engine."""
_SAID = ("text", "content", "reasoning_content", "reasoning")
_CLOSE = 0.02
"""Of a score: what another batch or another card may change."""


@dataclass(frozen=True)
class Recognition:
    """How a model is recognised."""

    model: str
    """Its name at the address."""
    probes: Sequence[Mapping[str, Any]]
    """Its questions."""
    way_out: str
    """What a user may do who means another model, or knows that it is the same."""
    same_model: bool = False
    """Whether the user has said that it is the one whose answers are kept."""

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The requests."""
        return [{"model": self.model, **probe} for probe in self.probes]

    def compared(self, kept: Any, ask: Callable[[Mapping[str, Any]], Any],
                 place: str) -> tuple[list[Any], str]:
        """Return what to keep as its answers, and what a user should know, in a sentence or "".

        Args:
            kept: what it answered before, as this returned it; or one answer, to the first question, as
                earlier versions kept it; None: it was never asked.
            ask: sends a request, and returns its answer.
            place: the address.

        Raises:
            UserError: another model answers.
        """
        before = kept["answers"] if isinstance(kept, dict) and "answers" in kept else [kept]
        before = [] if kept is None else before
        now = [ask(question) for question in self.questions]
        others = [i for i, (one, other) in enumerate(zip(before, now, strict=False))
                  if not is_same(one, other) and _stays(self.questions[i], one, other, ask)]
        if self.same_model and others:
            return now, ""
        told = f"{len(others)} of {len(before)} fixed questions" if len(before) > 1 else "a fixed question"
        if others and len(others) >= OTHER_FROM * len(before):
            one, other = (_shown(answers[others[0]]) for answers in (before, now))
            raise UserError(f"{place}: answers {told} otherwise than the model {self.model!r} whose answers "
                            f"are kept ({other} now, {one} before). Nothing was removed or asked again: "
                            + self.way_out)
        return before + now[len(before):], (
            f"{place}: answers {told} otherwise than before, as another version of an engine does; it is "
            "taken for the same model, and the cached answers are used" if others else "")


def _stays(question: Mapping[str, Any], one: Any, other: Any,
           ask: Callable[[Mapping[str, Any]], Any]) -> bool:
    """Return whether the other answer comes again each time: one that says something else each time cannot be
    told from others."""
    for _ in range(ASKED_AGAIN):
        again = ask(question)
        if is_same(one, again) or not is_same(other, again):
            return False
    return True


def _shown(answer: Any) -> str:
    name = answer.get("model") if isinstance(answer, dict) else None
    said = repr(next(_said(answer), ""))[:80]
    return f"{said} of {name[:80]!r}" if isinstance(name, str) else said


def is_same(one: Any, other: Any) -> bool:
    """Return whether two answers to one question say the same and name the same model."""
    names = [answer.get("model") for answer in (one, other) if isinstance(answer, dict)]
    if len(names) == 2 and all(isinstance(name, str) for name in names) and names[0] != names[1]:
        return False
    ours, theirs = list(_said(one)), list(_said(other))
    return len(ours) == len(theirs) and all(map(_agree, ours, theirs))


def _agree(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return abs(one - other) <= _CLOSE * max(1.0, abs(one), abs(other))


def _said(answer: Any, name: str = "") -> Iterator[str | float]:
    """Yield the texts of an answer's choices, and the numbers of its data."""
    if isinstance(answer, dict):
        for key in sorted(answer):
            if name or key in ("choices", "data"):
                yield from _said(answer[key], key)
    elif isinstance(answer, list):
        for part in answer:
            yield from _said(part, name)
    elif (isinstance(answer, str) and name in _SAID) or (isinstance(answer, float) and name == "data"):
        yield answer
