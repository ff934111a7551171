"""Labels that a team has given to texts: read, checked, and cut into three parts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.json_lines import read_objects
from megatron_sov.base.errors import UserError, list_problems

Kind = Literal["classifier", "regressor"]
KINDS: tuple[Kind, ...] = ("classifier", "regressor")
HIGHEST: dict[Kind, int] = {"classifier": 1, "regressor": 5}
"""Kind -> the highest label; the lowest one is 0."""
MIN_LABELS, MIN_PER_CLASS = 50, 10
MAX_PROBLEMS = 20
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8}){0,3}")
HELD_OUT, CALIBRATION = 0.1, 0.1
"""Shares of the labels of each class that judge the scorer, and that choose and calibrate it."""


@dataclass(frozen=True)
class Label:
    """A text and what it was given."""

    text: str
    """Its beginning, as far as scorers read."""
    label: float
    """0 or 1; or 0 to 5."""
    language: str
    """Code of its language; "": not said."""


@dataclass(frozen=True)
class LabelSplits:
    """Labels cut into parts that share no text."""

    fit: list[Label]
    """What weights are fitted to."""
    calibration: list[Label]
    """What chooses between fits, and calibrates the chosen one."""
    heldout: list[Label]
    """What nothing was fitted to or chosen by: the figures in the manifest are of these."""


def read_labels(file: Path, kind: Kind, max_chars: int, *, least: int = 1) -> tuple[list[Label], int]:
    """Return labels in the order of a JSONL file, and how many lines were left out because their text, as
    far as it is read, stood there before.

    Args:
        file: lines with `text`, `label` and perhaps `language`.
        kind: what is to be learned; it says which labels there are.
        max_chars: characters of a text that are kept.
        least: labels that have to be there.

    Raises:
        UserError: lines that are no labels (all of them, up to 20), or too few.
    """
    found: dict[bytes, Label] = {}
    problems: list[str] = []
    num_again = 0
    for where, record in read_objects(file):
        if problem := _problem(record, kind):
            problems.append(f"{where}: {problem}")
            if len(problems) == MAX_PROBLEMS:
                break
            continue
        text = record["text"][:max_chars]
        key = _key(text)
        if key in found:
            num_again += 1
        else:
            found[key] = Label(text, float(record["label"]), record.get("language") or "")
    if problems:
        raise UserError(list_problems(str(file), problems, "mend these lines or remove them"))
    labels = list(found.values())
    if len(labels) < least:
        raise UserError(f"{file}: has {len(labels)} labelled texts that differ; at least {least} are needed")
    return labels, num_again


def refuse_one_class(file: Path, labels: Sequence[Label], kind: Kind) -> None:
    """Raise `UserError` where labels cannot teach anything: a class is missing or nearly so, or all labels
    are the same."""
    counts = Counter(item.label for item in labels)
    if kind == "regressor":
        if len(counts) < 2:
            raise UserError(f"{file}: all {len(labels)} labels are {labels[0].label:g}; a regressor needs "
                            "texts with different ones")
        return
    for label in (0, 1):
        if counts[label] < MIN_PER_CLASS:
            raise UserError(f"{file}: {counts[label]} of {len(labels)} texts have label {label}; a "
                            f"classifier needs at least {MIN_PER_CLASS} of each of 0 and 1")


def split(labels: Sequence[Label]) -> LabelSplits:
    """Cut labels into parts, by the hashes of their texts within each class, so that the same text lies on
    the same side whatever stands beside it."""
    parts = LabelSplits([], [], [])
    by_class: dict[int, list[Label]] = {}
    for item in labels:
        by_class.setdefault(round(item.label), []).append(item)
    for _, members in sorted(by_class.items()):
        ordered = sorted(members, key=lambda item: _key(item.text))
        first = math.ceil(len(ordered) * HELD_OUT)
        second = first + math.ceil(len(ordered) * CALIBRATION)
        parts.heldout.extend(ordered[:first])
        parts.calibration.extend(ordered[first:second])
        parts.fit.extend(ordered[second:])
    return parts


def values(labels: Sequence[Label]) -> np.ndarray:
    """Return the labels as float64."""
    return np.array([item.label for item in labels], np.float64)


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _problem(record: dict[str, Any], kind: Kind) -> str:
    """Return the rule that a line breaks; "": none."""
    text, label, language = record.get("text"), record.get("label"), record.get("language")
    if not isinstance(text, str) or not text.strip():
        return f"text = {str(text)[:40]!r} must be a text that is not empty"
    if "label" not in record:
        return "has no field 'label'"
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label:
        return f"label = {label!r:.40} must be a number"
    if kind == "classifier" and label not in (0, 1):
        return f"label = {label!r:.40} must be 0 or 1 (a scale from 0 to 5 is for --kind regressor)"
    if not 0 <= label <= HIGHEST[kind]:
        return f"label = {label!r:.40} must be from 0 to {HIGHEST[kind]}"
    if language and not (isinstance(language, str) and _LANGUAGE.fullmatch(language)):
        return f"language = {language!r:.40} must be a code such as \"ko\""
    return ""
