"""Read labelled texts from a JSONL file, check them, and split them for training."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import RowProblems, UserError

Kind = Literal["classifier", "regressor"]
HIGHEST_LABELS: dict[Kind, int] = {"classifier": 1, "regressor": 5}
"""Kind -> highest label; the lowest label is 0."""
MIN_LABELS, MIN_PER_CLASS = 50, 10
HELDOUT_SHARE, CALIBRATION_SHARE = 0.1, 0.1
"""Share of each class for `LabelSplits.heldout` and `LabelSplits.calibration`."""
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8}){0,3}")


@dataclass(frozen=True)
class Label:
    """A labelled text."""

    text: str
    """Start of the text, as far as scorers read."""
    label: float
    """From 0 to `HIGHEST_LABELS`."""
    language: str
    """Language code; "": unknown."""


@dataclass(frozen=True)
class LabelSplits:
    """Labels in three parts without common texts."""

    fit: list[Label]
    """For fitting weights."""
    calibration: list[Label]
    """For choosing the penalty and calibrating scores."""
    heldout: list[Label]
    """For metrics."""


def read_labels(file: Path, kind: Kind, max_chars: int, *, min_labels: int = 1) -> tuple[list[Label], int]:
    """Read labels from a JSONL file, without repeated texts.

    Args:
        file: lines with `text`, `label` and optionally `language`.
        kind: determines the allowed labels.
        max_chars: texts are cut to this length.
        min_labels: required number of different texts.

    Returns:
        Labels in the order of the file, and the number of repeated texts.

    Raises:
        UserError: invalid lines, or too few labels.
    """
    labels: dict[bytes, Label] = {}
    problems, num_repeated = RowProblems(), 0
    for where, record in read_records(file):
        if problem := _find_label_problem(record, kind):
            problems.add(where, problem)
            continue
        text = record["text"][:max_chars]
        text_hash = _hash_text(text)
        if text_hash in labels:
            num_repeated += 1
        else:
            labels[text_hash] = Label(text, float(record["label"]), record.get("language") or "")
    if problems:
        raise UserError(problems.format(str(file), "correct or remove these lines"))
    if len(labels) < min_labels:
        raise UserError(f"{file}: has {len(labels)} labelled texts that differ; at least {min_labels} are "
                        "needed")
    return list(labels.values()), num_repeated


def _find_label_problem(record: dict[str, Any], kind: Kind) -> str:
    text, label, language = record.get("text"), record.get("label"), record.get("language")
    if not isinstance(text, str) or not text.strip():
        return f"text = {str(text)[:40]!r} must be a text that is not empty"
    if "label" not in record:
        return "has no field 'label'"
    is_nan = label != label
    if isinstance(label, bool) or not isinstance(label, (int, float)) or is_nan:
        scale = "0 (bad) or 1 (good)" if kind == "classifier" else f"from 0 to {HIGHEST_LABELS[kind]}"
        return f"label = {label!r:.40} must be a number, {scale}"
    if kind == "classifier" and label not in (0, 1):
        return f"label = {label!r:.40} must be 0 or 1 (a scale from 0 to 5 is for --kind regressor)"
    if not 0 <= label <= HIGHEST_LABELS[kind]:
        return f"label = {label!r:.40} must be from 0 to {HIGHEST_LABELS[kind]}"
    if language and not (isinstance(language, str) and _LANGUAGE.fullmatch(language)):
        return f"language = {language!r:.40} must be a code such as \"ko\""
    return ""


def check_label_variety(file: Path, labels: Sequence[Label], kind: Kind) -> None:
    """Raise `UserError` if a class has too few labels, or all labels of a regressor are equal."""
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


def split_labels(labels: Sequence[Label]) -> LabelSplits:
    """Split each class by the hashes of its texts: added labels move few texts between the parts."""
    splits = LabelSplits([], [], [])
    # By class, so that each part has texts of a rare class.
    by_class: dict[int, list[Label]] = {}
    for item in labels:
        by_class.setdefault(round(item.label), []).append(item)
    for _, members in sorted(by_class.items()):
        ordered = sorted(members, key=lambda item: _hash_text(item.text))
        heldout_end = math.ceil(len(ordered) * HELDOUT_SHARE)
        calibration_end = heldout_end + math.ceil(len(ordered) * CALIBRATION_SHARE)
        splits.heldout.extend(ordered[:heldout_end])
        splits.calibration.extend(ordered[heldout_end:calibration_end])
        splits.fit.extend(ordered[calibration_end:])
    return splits


def get_label_values(labels: Sequence[Label]) -> np.ndarray:
    """Return the labels as float64 [num_labels]."""
    return np.array([item.label for item in labels], np.float64)


def _hash_text(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
