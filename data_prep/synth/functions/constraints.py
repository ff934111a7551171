"""Cross-validation of functions that check a constraint (AutoIF, arXiv 2406.13542).

Several replies contain a check function and test cases each; functions and cases judge each other. AutoIF
keeps a case if any function agrees, and then selects functions by their share of kept cases. If all functions
share a mistake, such as accepting every text, AutoIF drops the cases that show the mistake and keeps the
functions. Here a minimum share of cases must stay too, and a function must reject an ordinary text or a kept
false case, and accept a true case.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.synth.replies import NoReply
from data_prep.synth.samples import SampleVerdict
from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.constraint import (
    MAX_TEXT_CHARS, ConstraintVerdict, check_texts, find_check_problem, segment_text)
from megatron_sov.judge.rewards.program_text import extract_program
from megatron_sov.sandbox.sandbox import shared_sandbox

MAX_CONSTRAINT_CHARS = 300
MAX_CASES = 10
"""Cases per reply."""
MAX_JSON_CHARS = 200_000
MAX_TIMEOUTS = 2
"""Timeouts before a constraint's remaining functions are skipped."""
SANDBOX_WORKERS, CALL_TIME_S = 2, 5.0
"""Concurrent functions, and processor seconds for a function and a text."""
_JSON = re.compile(r"^[ \t]*```[ \t]*json[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{[^{}\n]{0,40}\}")
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+(.+?)\s*$", re.MULTILINE)
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Case:
    """A text, and whether the text keeps the constraint according to the reply."""

    text: str
    keeps: bool


@dataclass(frozen=True)
class FunctionDraft:
    """A check function with cases."""

    source: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class CheckedFunctions:
    """Result from `cross_check`."""

    verdict: SampleVerdict
    """The failed check, or the last check."""
    functions: tuple[str, ...] = ()
    """Accepted sources, best first."""
    accuracies: tuple[float, ...] = ()
    """Share of `cases` on which a function agrees, for each function."""
    cases: tuple[dict[str, Any], ...] = ()
    """Cases on which at least one function agrees, as in records."""
    faults: tuple[str, ...] = ()
    """Problems in unparsable replies."""


def parse_list_items(text: str) -> list[str]:
    """Return the different items in Markdown lists."""
    return list({" ".join(item.casefold().split()): item for item in _LIST_LINE.findall(text)}.values())


def find_wording_problem(constraint: str) -> str:
    """Return the problem in a constraint's wording, or ""."""
    if not constraint.strip():
        return "is empty"
    if len(constraint) > MAX_CONSTRAINT_CHARS:
        return f"has {len(constraint)} characters, at most {MAX_CONSTRAINT_CHARS} are taken"
    if "\n" in constraint:
        return "has several lines"
    placeholder = _PLACEHOLDER.search(constraint)
    return f"has the placeholder {placeholder[0]}" if placeholder else ""


def parse_draft(reply: str) -> FunctionDraft | str:
    """Parse a Python block with the function and a JSON block with cases; return a problem sentence for
    another form."""
    if getattr(reply, "cut", False):
        return "was cut off"
    source = extract_program(reply, ("evaluate",)).strip()
    if problem := find_check_problem(source):
        return problem
    blocks = _JSON.findall(reply)
    try:
        # the last block: earlier blocks are drafts
        items = json.loads(blocks[-1][:MAX_JSON_CHARS]) if blocks else None
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        return "has no block of JSON with a list of cases"
    cases = (_parse_case(item) for item in items[:MAX_CASES])
    return FunctionDraft(source, tuple(case for case in cases if case))


def _parse_case(item: Any) -> Case | None:
    if not isinstance(item, dict) or not isinstance(item.get("input"), str):
        return None
    output = item.get("output")
    keeps = _BOOLEANS.get(output.strip().lower()) if isinstance(output, str) else output
    if not isinstance(keeps, bool) or len(item["input"]) > MAX_TEXT_CHARS:
        return None
    return Case(item["input"], keeps)


def run_check(source: str, texts: Sequence[str]) -> Sequence[ConstraintVerdict]:
    """Run a check function on texts in the sandbox; raises `NoReply` if the machine failed."""
    try:
        return check_texts(shared_sandbox(workers=SANDBOX_WORKERS), source, texts, call_s=CALL_TIME_S)
    except (RuntimeError, TimeoutError) as e:
        raise NoReply(str(e)) from None


def cross_check(replies: Sequence[str], ordinary: Sequence[str], *, min_functions: int, min_cases: int,
                min_kept_share: float, min_accuracy: float) -> CheckedFunctions:
    """Select a constraint's functions.

    Args:
        replies: replies with a function and cases each.
        ordinary: answers written without the constraint.
        min_functions: minimum of different functions.
        min_cases: minimum of different cases.
        min_kept_share: minimum share of cases with which at least one function agrees.
        min_accuracy: minimum share of kept cases with which a function agrees.
    """
    parsed = [parse_draft(reply) for reply in replies]
    drafts = [draft for draft in parsed if isinstance(draft, FunctionDraft)]
    faults = tuple(fault for fault in parsed if isinstance(fault, str))
    sources = list(dict.fromkeys(draft.source for draft in drafts))
    cases = list(dict.fromkeys(case for draft in drafts for case in draft.cases))

    def reject_functions(check: str, detail: str, agreed: Sequence[Case] = ()) -> CheckedFunctions:
        return CheckedFunctions(SampleVerdict(check, False, detail), cases=_to_records(agreed), faults=faults)

    if len(sources) < min_functions:
        fault = f"; one {faults[0]}" if faults else ""
        return reject_functions("functions",
                                f"{len(sources)} different ones; {min_functions} are needed{fault}")
    if len(cases) < min_cases:
        return reject_functions("cases", f"{len(cases)} different ones; {min_cases} are needed")
    results = _run_functions(sources, [*dict.fromkeys([*(case.text for case in cases), *ordinary])])
    if results is None:
        return reject_functions("ends", f"{MAX_TIMEOUTS} functions did not end in time")
    agreed = [case for case in cases if any(accepts[case.text] == case.keeps for accepts in results.values())]
    if len(agreed) < min_kept_share * len(cases):
        return reject_functions("agreement",
                                f"{len(agreed)} of {len(cases)} cases have a function that agrees", agreed)
    accuracies = {source: sum(accepts[case.text] == case.keeps for case in agreed) / max(1, len(agreed))
                  for source, accepts in results.items()}
    exact = [source for source, accuracy in accuracies.items() if accuracy >= min_accuracy]
    if not exact:
        best = max(accuracies.values(), default=0.0)
        return reject_functions("accuracy",
                                f"the best function agrees with {best:.0%} of {len(agreed)} cases", agreed)
    # a function that accepts every text agrees with every true case
    selected = [source for source in exact if _distinguishes_texts(results[source], agreed, ordinary)]
    if not selected:
        return reject_functions("tells apart", f"{len(exact)} functions accept, or reject, each text", agreed)
    selected.sort(key=lambda source: -accuracies[source])  # stable: equal accuracies keep the reply order
    return CheckedFunctions(SampleVerdict("tells apart", True), tuple(selected),
                            tuple(round(accuracies[source], 4) for source in selected), _to_records(agreed),
                            faults)


def _to_records(cases: Sequence[Case]) -> tuple[dict[str, Any], ...]:
    return tuple({"input": case.text, "output": case.keeps} for case in cases)


def _run_functions(sources: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, bool | None]] | None:
    """Return source -> text -> accepted, without functions that time out; None after `MAX_TIMEOUTS`."""
    results: dict[str, dict[str, bool | None]] = {}
    for number, source in enumerate(sources, 1):
        verdicts = run_check(source, texts)
        if all(verdict.ended for verdict in verdicts):
            results[source] = {text: verdict.accepts for text, verdict in zip(texts, verdicts, strict=True)}
        # the remaining functions would most likely time out as well
        if number - len(results) == MAX_TIMEOUTS:
            return None
    return results


def _distinguishes_texts(accepts: dict[str, bool | None], cases: Sequence[Case], ordinary: Sequence[str]
                         ) -> bool:
    """Return whether a function rejects a false case or ordinary text and accepts a true case, without
    blank texts."""
    wrong = [*(case.text for case in cases if not case.keeps), *ordinary]
    right = [case.text for case in cases if case.keeps]
    return (any(accepts[text] is False for text in wrong if text.strip())
            and any(accepts[text] is True for text in right if text.strip()))


@dataclass(frozen=True)
class Acceptance:
    """Result from `count_accepting_functions`, for templates."""

    num: int
    why: str
    """Reason from the first function without a verdict."""


def count_accepting_functions(functions: Sequence[str], text: str,
                              segmenter: Literal["none", "rules", "pythainlp"]) -> Acceptance:
    """Count the functions that accept a text, or a view with separated sentences or words. Raises `NoReply`:
    the machine failed; the item is tried again. Raises `UserError`: the segmenter is not installed."""
    if len(text) > MAX_TEXT_CHARS:
        return Acceptance(0, f"has {len(text):,} characters")
    try:
        views = segment_text(text, segmenter)
    except ImportError:
        raise UserError("segmenter = pythainlp: is not installed; pip install pythainlp, or set "
                        "segmenter=rules") from None
    # one accepted view suffices: functions do not know the views of a language
    verdicts = [run_check(function, views) for function in functions]
    reason = next((verdict.reason for row in verdicts for verdict in row if verdict.reason),
                  "no function accepts it")
    return Acceptance(sum(any(verdict.accepts for verdict in row) for row in verdicts), reason)
