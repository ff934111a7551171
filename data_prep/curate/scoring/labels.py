"""Labels that a team has given to texts: read, checked, cut into three parts; and how good scores are against
them, in the figures that a scorer's manifest and `scorer check` give."""

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

from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import RowProblems, UserError

Kind = Literal["classifier", "regressor"]
KINDS: tuple[Kind, ...] = ("classifier", "regressor")
HIGHEST_LABELS: dict[Kind, int] = {"classifier": 1, "regressor": 5}
"""Kind -> the highest label; the lowest one is 0."""
MIN_LABELS, MIN_PER_CLASS = 50, 10
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
        UserError: lines that are no labels, or too few.
    """
    found: dict[bytes, Label] = {}
    problems, num_again = RowProblems(), 0
    for where, record in read_records(file):
        if problem := _problem(record, kind):
            problems.add(where, problem)
            continue
        text = record["text"][:max_chars]
        key = _key(text)
        if key in found:
            num_again += 1
        else:
            found[key] = Label(text, float(record["label"]), record.get("language") or "")
    if problems:
        raise UserError(problems.format(str(file), "correct or remove these lines"))
    labels = list(found.values())
    if len(labels) < least:
        raise UserError(f"{file}: has {len(labels)} labelled texts that differ; at least {least} are needed")
    return labels, num_again


def check_label_variety(file: Path, labels: Sequence[Label], kind: Kind) -> None:
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


def split_labels(labels: Sequence[Label]) -> LabelSplits:
    """Cut labels into parts, by the hashes of their texts within each class, so that the same text lies on
    the same side whatever stands beside it."""
    parts = LabelSplits([], [], [])
    by_class: dict[int, list[Label]] = {}
    for item in labels:
        by_class.setdefault(round(item.label), []).append(item)
    for _, members in sorted(by_class.items()):
        # By class, so that a rare one is in every part; by hash, so that more labels move few texts between
        # parts.
        ordered = sorted(members, key=lambda item: _key(item.text))
        first = math.ceil(len(ordered) * HELD_OUT)
        second = first + math.ceil(len(ordered) * CALIBRATION)
        parts.heldout.extend(ordered[:first])
        parts.calibration.extend(ordered[first:second])
        parts.fit.extend(ordered[second:])
    return parts


def get_label_values(labels: Sequence[Label]) -> np.ndarray:
    """Return the labels as float64."""
    return np.array([item.label for item in labels], np.float64)


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _problem(record: dict[str, Any], kind: Kind) -> str:
    text, label, language = record.get("text"), record.get("label"), record.get("language")
    if not isinstance(text, str) or not text.strip():
        return f"text = {str(text)[:40]!r} must be a text that is not empty"
    if "label" not in record:
        return "has no field 'label'"
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label:
        scale = "0 (bad) or 1 (good)" if kind == "classifier" else f"from 0 to {HIGHEST_LABELS[kind]}"
        return f"label = {label!r:.40} must be a number, {scale}"
    if kind == "classifier" and label not in (0, 1):
        return f"label = {label!r:.40} must be 0 or 1 (a scale from 0 to 5 is for --kind regressor)"
    if not 0 <= label <= HIGHEST_LABELS[kind]:
        return f"label = {label!r:.40} must be from 0 to {HIGHEST_LABELS[kind]}"
    if language and not (isinstance(language, str) and _LANGUAGE.fullmatch(language)):
        return f"language = {language!r:.40} must be a code such as \"ko\""
    return ""


_OWN = {"classifier": (("brier", "Brier score"),),
        "regressor": (("spearman", "Spearman"), ("mean_absolute_error", "mean error"))}
"""Kind -> figures that it alone has, and what they are called."""
GOOD_SCORES = {"classifier": 0.5, "regressor": 3.0}
"""The score from which a text counts as good; 3 is FineWeb-Edu's."""


def compute_metrics(kind: Kind, labels: Sequence[Label], scores: np.ndarray) -> dict[str, Any]:
    """Return the figures of all labels, and under "languages" those of each language.

    `auc` or `spearman` is null where labels or scores do not differ.
    """
    languages = {}
    for name in sorted({item.language for item in labels}):
        places = [i for i, item in enumerate(labels) if item.language == name]
        chosen = get_label_values([labels[i] for i in places])
        languages[name or "not said"] = _figures(kind, chosen, scores[places])
    return {**_figures(kind, get_label_values(labels), scores), "languages": languages}


def _figures(kind: Kind, labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    keeps = GOOD_SCORES[kind]
    # A regressor too is asked whether it keeps what is worth keeping.
    good, kept = labels >= keeps, scores >= keeps
    hits = int((good & kept).sum())
    found: dict[str, Any] = {
        "num_labels": len(labels),
        # Undefined, and null, where one class is absent.
        "auc": float(roc_auc_score(good, scores)) if good.any() and not good.all() else None,
        "precision": hits / int(kept.sum()) if kept.any() else None,
        "recall": hits / int(good.sum()) if good.any() else None,
    }
    if kind == "classifier":
        return {**found, "brier": float(np.mean((scores - labels) ** 2))}
    differ = len(set(labels.tolist())) > 1 and len(set(scores.tolist())) > 1
    return {**found, "spearman": float(spearmanr(labels, scores).statistic) if differ else None,
            "mean_absolute_error": float(np.mean(np.abs(scores - labels)))}


def format_metrics(kind: Kind, figures: dict[str, Any]) -> list[str]:
    lines = [f"  {_line(kind, figures)}"]
    if len(figures["languages"]) > 1 or "not said" not in figures["languages"]:
        lines += [f"  {name}: {_line(kind, of)}" for name, of in figures["languages"].items()]
    return lines


def _line(kind: Kind, figures: dict[str, Any]) -> str:
    names = (("auc", "AUC"), ("precision", "precision"), ("recall", "recall"), *_OWN[kind])
    shown = ", ".join(f"{name} {'-' if figures[key] is None else format(figures[key], '.4f')}"
                      for key, name in names)
    return f"{figures['num_labels']:,} texts: {shown} (good: {GOOD_SCORES[kind]:g} or more)"
