"""What the generator `constraints` keeps, read again: `autoif` starts from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.json_lines import read_objects
from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.judge.rewards.constraint import functions_of
from megatron_sov.judge.rewards.reward import Refused

FILE = "kept.jsonl"
"""Of the folder that `constraints` writes."""
MOST_TOLD = 10
MAX_CONSTRAINT_CHARS = 300
_PLACEHOLDER = re.compile(r"\{[^{}\n]{0,40}\}")


def wording_problem(constraint: str) -> str:
    """Return why a text is no constraint; empty: it is one."""
    if not constraint.strip():
        return "is empty"
    if len(constraint) > MAX_CONSTRAINT_CHARS:
        return f"has {len(constraint)} characters, at most {MAX_CONSTRAINT_CHARS} are taken"
    if "\n" in constraint:
        return "has several lines"
    if found := _PLACEHOLDER.search(constraint):
        return f"has the placeholder {found[0]}"
    return ""


@dataclass(frozen=True)
class KeptConstraint:
    """One constraint with its functions."""

    wordings: tuple[str, ...]
    """The constraint, and what its functions ask for in words; one of them is used."""
    functions: tuple[str, ...]
    """Sources, the best first."""


def read_constraints(path: Path) -> list[KeptConstraint]:
    """Return the constraints of a folder of the generator `constraints`, or of a JSONL file in its form.

    Raises:
        UserError: it cannot be read, has none, or one has no function; all such lines are told.
    """
    found, problems = [], []
    for where, record in read_objects(path / FILE if path.is_dir() else path):
        constraint, back = record.get("prompt"), record.get("back", [])
        try:
            functions = functions_of(record, ())
        except Refused as e:
            problems.append(f"{where}: {e}")
            continue
        if not isinstance(constraint, str) or wording_problem(constraint):
            problems.append(f"{where}: prompt must be the constraint, a line of text")
            continue
        # what functions ask for in words is another wording of the constraint
        told = [one for one in back if isinstance(one, str)] if isinstance(back, list) else []
        wordings = [constraint, *(one.strip() for one in told if not wording_problem(one.strip()))]
        found.append(KeptConstraint(tuple(dict.fromkeys(wordings)), tuple(functions)))
    if problems:
        raise UserError(list_problems("constraints", problems[:MOST_TOLD]))
    if not found:
        raise UserError(f"constraints = {path}: has none; make some with `sov-data synth constraints`")
    return found
