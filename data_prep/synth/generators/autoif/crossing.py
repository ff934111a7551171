"""Cross-validation: functions and cases of several answers judge each other, and nothing passes that accepts
everything.

AutoIF keeps a case that one function agrees with, and then functions by their share of kept cases.  Where
all functions of a constraint make one mistake, such as to accept everything, each case that shows it goes,
and all functions stay.  Here a share of the cases must stay as well, and a function must reject an ordinary
text, one of its own kept false cases or one that was written for another constraint, and accept one of its
own true ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sov.judge.rewards.code import program_in
from megatron_sov.judge.rewards.constraint import MAX_TEXT_CHARS, ConstraintVerdict, problem_of

Judging = Callable[[str, Sequence[str]], Sequence[ConstraintVerdict]]
"""Source of a check and texts -> what it says of each."""
MAX_CASES = 10
"""That are taken of one answer."""
MAX_JSON_CHARS = 200_000
MAX_UNENDED = 2
"""Functions of a constraint that may take all their time; the others are not asked then."""
_JSON = re.compile(r"^[ \t]*```[ \t]*json[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Case:
    """A text, and whether it keeps the constraint."""

    text: str
    """A response."""
    keeps: bool
    """What its writer says."""


@dataclass(frozen=True)
class CrossingDraft:
    """What one answer says: a check with its cases."""

    source: str
    """Python, with no problem."""
    cases: tuple[Case, ...]
    """In the answer's order."""


@dataclass(frozen=True)
class Crossed:
    """What is left of drafts."""

    functions: tuple[str, ...] = ()
    """Sources that stay, the best first."""
    accuracies: tuple[float, ...] = ()
    """Share of the kept cases that each agrees with."""
    cases: tuple[Case, ...] = ()
    """That stay."""
    check: str = ""
    """Name of the check that nothing passed; empty: functions are left."""
    detail: str = ""
    """What was seen, where nothing passed."""


def read_draft(answer: str, modules: Sequence[str] = ()) -> CrossingDraft | str:
    """Return the check and the cases of an answer: a block of Python and a block of JSON; or what is wrong
    with it, as the end of a sentence."""
    source = program_in(answer).strip()
    if problem := problem_of(source, modules):
        return problem
    blocks = _JSON.findall(answer)
    try:
        listed = json.loads(blocks[-1][:MAX_JSON_CHARS]) if blocks else None
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        return "has no block of JSON with a list of cases"
    cases = [_case(one) for one in listed[:MAX_CASES]]
    return CrossingDraft(source, tuple(case for case in cases if case))


def _case(given: object) -> Case | None:
    if not isinstance(given, dict) or not isinstance(given.get("input"), str):
        return None
    output = given.get("output")
    keeps = _TRUTH.get(output.strip().lower()) if isinstance(output, str) else output
    if not isinstance(keeps, bool) or len(given["input"]) > MAX_TEXT_CHARS:
        return None
    return Case(given["input"], keeps)


def crossed(drafts: Sequence[CrossingDraft], others: Sequence[str], judging: Judging, *, min_functions: int,
            min_cases: int, min_kept_share: float, min_accuracy: float) -> Crossed:
    """Return what is left of the drafts of one constraint.

    Args:
        drafts: those that can be read.
        others: texts that were not written for this constraint.
        judging: runs a check.
        min_functions: different ones that there must be.
        min_cases: different ones that there must be.
        min_kept_share: of the cases, that one function or another must agree with.
        min_accuracy: of a function that stays.
    """
    sources = list(dict.fromkeys(draft.source for draft in drafts))
    cases = list(dict.fromkeys(case for draft in drafts for case in draft.cases))
    if len(sources) < min_functions:
        return Crossed(check="functions", detail=f"{len(sources)} different ones; {min_functions} are needed")
    if len(cases) < min_cases:
        return Crossed(check="cases", detail=f"{len(cases)} different ones; {min_cases} are needed")
    texts = list(dict.fromkeys([*(case.text for case in cases), *others]))
    said: dict[str, dict[str, bool | None]] = {}
    unended = 0
    for source in sources:
        told = judging(source, texts)
        if all(verdict.ended for verdict in told):
            said[source] = {text: one.accepts for text, one in zip(texts, told, strict=True)}
        else:
            unended += 1
        if unended == MAX_UNENDED:
            return Crossed(check="ends", detail=f"{unended} functions did not end in time")
    kept = [case for case in cases if any(verdicts[case.text] == case.keeps for verdicts in said.values())]
    scored = [(sum(verdicts[case.text] == case.keeps for case in kept) / max(1, len(kept)), source)
              for source, verdicts in said.items()]
    if len(kept) < min_kept_share * len(cases):
        return Crossed(cases=tuple(kept), check="agreement", detail=f"{len(kept)} of {len(cases)} cases "
                       f"have a function that agrees; {unended} functions did not end")
    exact = [(accuracy, source) for accuracy, source in scored if accuracy >= min_accuracy]
    if not exact:
        best = max((accuracy for accuracy, _ in scored), default=0.0)
        return Crossed(cases=tuple(kept), check="accuracy", detail=f"the best function agrees with "
                       f"{best:.0%} of {len(kept)} cases")
    telling = [(accuracy, source) for accuracy, source in exact if _tells(said[source], kept, others)]
    if not telling:
        return Crossed(cases=tuple(kept), check="tells apart", detail=f"{len(exact)} functions accept, or "
                       f"reject, each of {len(texts)} texts")
    telling.sort(key=lambda one: -one[0])  # stable: the writer's order among equals
    return Crossed(tuple(source for _, source in telling), tuple(accuracy for accuracy, _ in telling),
                   tuple(kept))


def _tells(said: dict[str, bool | None], kept: Sequence[Case], others: Sequence[str]) -> bool:
    """Return whether a function rejects a text that it ought to look at, and accepts one that keeps the
    constraint; to reject nothing but blanks tells nothing."""
    wrong = [*(case.text for case in kept if not case.keeps), *others]
    right = [case.text for case in kept if case.keeps]
    return (any(said[text] is False for text in wrong if text.strip())
            and any(said[text] is True for text in right if text.strip()))
