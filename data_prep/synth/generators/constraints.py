"""Cross-validation of functions that check a constraint: functions and cases of several replies judge each
other (AutoIF, arXiv 2406.13542).

AutoIF keeps a case that one function agrees with, and then functions by their share of kept cases.  If all
functions make one mistake, such as to accept everything, each case that shows it goes, and all functions
stay.  Here a share of the cases must stay as well, and a function must reject an ordinary text or a kept
false case, and accept a true one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.replies import NoReply
from megatron_sov.judge.rewards.constraint import (
    MAX_TEXT_CHARS, ConstraintVerdict, check_texts, find_check_problem)
from megatron_sov.judge.rewards.program_text import extract_program
from megatron_sov.sandbox.sandbox import shared_sandbox

MAX_CONSTRAINT_CHARS = 300
MAX_CASES = 10
"""Cases of one reply."""
MAX_JSON_CHARS = 200_000
MAX_UNENDED = 2
"""Functions of a constraint that may take all their time; the others are not run then."""
SANDBOX_WORKERS, CALL_TIME_S = 2, 5.0
"""Functions that run at a time, and seconds of a processor for a function and a text."""
_JSON = re.compile(r"^[ \t]*```[ \t]*json[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{[^{}\n]{0,40}\}")
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+(.+?)\s*$", re.MULTILINE)
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Case:
    """A text, and whether its writer says that it keeps the constraint."""

    text: str
    keeps: bool


@dataclass(frozen=True)
class FunctionDraft:
    """A check function with its cases."""

    source: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class CheckedFunctions:
    """Functions of a constraint that passed."""

    verdict: SampleVerdict
    """The check that failed, or a last one that passed."""
    functions: tuple[str, ...] = ()
    """Sources, the best first."""
    accuracies: tuple[float, ...] = ()
    """Share of the kept cases that each function agrees with."""
    cases: tuple[dict[str, Any], ...] = ()
    """Cases that one function or another agrees with, as records have them."""
    faults: tuple[str, ...] = ()
    """Why replies could not be read."""


def list_items(text: str) -> list[str]:
    """Return the items of a list in Markdown, each once."""
    return list({" ".join(item.casefold().split()): item for item in _LIST_LINE.findall(text)}.values())


def wording_problem(constraint: str) -> str:
    """Return why a text is no constraint; empty: it is one."""
    if not constraint.strip():
        return "is empty"
    if len(constraint) > MAX_CONSTRAINT_CHARS:
        return f"has {len(constraint)} characters, at most {MAX_CONSTRAINT_CHARS} are taken"
    if "\n" in constraint:
        return "has several lines"
    found = _PLACEHOLDER.search(constraint)
    return f"has the placeholder {found[0]}" if found else ""


def read_draft(reply: str) -> FunctionDraft | str:
    """Return function and cases of a reply: a block of Python and a block of JSON; or a sentence about its
    fault."""
    if getattr(reply, "cut", False):
        return "was cut off"
    source = extract_program(reply, ("evaluate",)).strip()
    if problem := find_check_problem(source):
        return problem
    blocks = _JSON.findall(reply)
    try:
        # the last block: a draft before it is not meant
        listed = json.loads(blocks[-1][:MAX_JSON_CHARS]) if blocks else None
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        return "has no block of JSON with a list of cases"
    cases = (_read_case(one) for one in listed[:MAX_CASES])
    return FunctionDraft(source, tuple(case for case in cases if case))


def _read_case(given: Any) -> Case | None:
    if not isinstance(given, dict) or not isinstance(given.get("input"), str):
        return None
    output = given.get("output")
    keeps = _TRUTH.get(output.strip().lower()) if isinstance(output, str) else output
    if not isinstance(keeps, bool) or len(given["input"]) > MAX_TEXT_CHARS:
        return None
    return Case(given["input"], keeps)


def run_check(source: str, texts: Sequence[str]) -> Sequence[ConstraintVerdict]:
    """Return what a check function says of texts, in the sandbox.

    Raises:
        NoReply: the machine could not run it: the item is made again.
    """
    try:
        return check_texts(shared_sandbox(workers=SANDBOX_WORKERS), source, texts, call_s=CALL_TIME_S)
    except (RuntimeError, TimeoutError) as e:
        raise NoReply(str(e)) from None


def cross_check(replies: Sequence[str], ordinary: Sequence[str], *, min_functions: int, min_cases: int,
                min_kept_share: float, min_accuracy: float) -> CheckedFunctions:
    """Return the functions of one constraint that pass.

    Args:
        replies: each with a function and its cases.
        ordinary: answers that were not written for this constraint.
        min_functions: different functions that there must be.
        min_cases: different cases that there must be.
        min_kept_share: of the cases, that one function or another must agree with.
        min_accuracy: share of the kept cases that a function must agree with.
    """
    read = [read_draft(reply) for reply in replies]
    drafts = [draft for draft in read if isinstance(draft, FunctionDraft)]
    faults = tuple(draft for draft in read if isinstance(draft, str))
    sources = list(dict.fromkeys(draft.source for draft in drafts))
    cases = list(dict.fromkeys(case for draft in drafts for case in draft.cases))

    def failed(check: str, detail: str, kept: Sequence[Case] = ()) -> CheckedFunctions:
        return CheckedFunctions(SampleVerdict(check, False, detail), cases=_records(kept), faults=faults)

    if len(sources) < min_functions:
        why = f"; one {faults[0]}" if faults else ""
        return failed("functions", f"{len(sources)} different ones; {min_functions} are needed{why}")
    if len(cases) < min_cases:
        return failed("cases", f"{len(cases)} different ones; {min_cases} are needed")
    accepted = _run_all(sources, [*dict.fromkeys([*(case.text for case in cases), *ordinary])])
    if accepted is None:
        return failed("ends", f"{MAX_UNENDED} functions did not end in time")
    kept = [case for case in cases if any(says[case.text] == case.keeps for says in accepted.values())]
    if len(kept) < min_kept_share * len(cases):
        return failed("agreement", f"{len(kept)} of {len(cases)} cases have a function that agrees", kept)
    accuracies = {source: sum(says[case.text] == case.keeps for case in kept) / max(1, len(kept))
                  for source, says in accepted.items()}
    exact = [source for source, accuracy in accuracies.items() if accuracy >= min_accuracy]
    if not exact:
        best = max(accuracies.values(), default=0.0)
        return failed("accuracy", f"the best function agrees with {best:.0%} of {len(kept)} cases", kept)
    # a function that accepts everything agrees with every true case
    telling = [source for source in exact if _tells_apart(accepted[source], kept, ordinary)]
    if not telling:
        return failed("tells apart", f"{len(exact)} functions accept, or reject, each text", kept)
    telling.sort(key=lambda source: -accuracies[source])  # stable: the writer's order among equals
    return CheckedFunctions(SampleVerdict("tells apart", True), tuple(telling),
                           tuple(round(accuracies[source], 4) for source in telling), _records(kept), faults)


def _records(cases: Sequence[Case]) -> tuple[dict[str, Any], ...]:
    return tuple({"input": case.text, "output": case.keeps} for case in cases)


def _run_all(sources: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, bool | None]] | None:
    """Return source -> text -> whether the function accepts it, of functions that end; None: several did
    not."""
    accepted: dict[str, dict[str, bool | None]] = {}
    for number, source in enumerate(sources, 1):
        said = run_check(source, texts)
        if all(verdict.ended for verdict in said):
            accepted[source] = {text: one.accepts for text, one in zip(texts, said, strict=True)}
        # the others of this constraint would most likely take all their time as well
        if number - len(accepted) == MAX_UNENDED:
            return None
    return accepted


def _tells_apart(accepts: dict[str, bool | None], kept: Sequence[Case], ordinary: Sequence[str]) -> bool:
    """Return whether a function rejects a text that it ought to look at, and accepts one that keeps the
    constraint; to reject nothing but blanks tells nothing."""
    wrong = [*(case.text for case in kept if not case.keeps), *ordinary]
    right = [case.text for case in kept if case.keeps]
    return (any(accepts[text] is False for text in wrong if text.strip())
            and any(accepts[text] is True for text in right if text.strip()))
