"""The data of our suites: the user's own copies, one split with the questions and the examples.

lm-eval hands the question that is asked to what chooses examples only where both are of one split.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.samplers import ContextSampler

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.task_rows import LOADERS, TaskRows, read_rows

TEST = "test"
LETTERS = "ABCDEFGHIJ"
_RULE = re.compile(r"(?P<kind>text|string|texts|integer|letter|value|list|object|any)"
                   r"(?: (?P<low>-?\d+|[A-J])(?:\.\.(?P<high>-?\d+|[A-J]))?)?(?P<optional> or null)?")
_TOLD = {"text": "a text that is not empty", "string": "a text", "texts": "a list of texts",
         "integer": "a whole number", "letter": "a letter", "value": "a text or a number",
         "list": "a list that is not empty", "object": "an object", "any": "there"}


def load(data_files: Mapping[str, Any] | None = None, sov: Mapping[str, Any] | None = None,
         **_: Any) -> dict[str, TaskRows]:
    """Return a task's rows (`custom_dataset`); each also has `group`, `row` (its number) and `is_shot`.

    Args:
        data_files: split -> file or files, of the task's `dataset_kwargs`.
        sov: of the task's metadata.

    Raises:
        UserError: a row breaks a rule of `fields`, or there is no question.
    """
    said = sov or {}
    rules, aliases = dict(said.get("fields", {})), said.get("aliases", {})
    made = TaskRows()
    for split, given in (data_files or {}).items():
        for path in map(Path, [given] if isinstance(given, str) else given):
            loader = next(name for name, endings in LOADERS.items() if path.suffix in endings)
            for number, row in enumerate(read_rows(loader, path), 1):
                row = renamed(row, aliases)
                if wrong := [text for name, rule in rules.items() if (text := problem(name, rule, row))]:
                    raise UserError(f"--data-dir {path}: row {number}: {'; '.join(wrong)}")
                group = said.get("group_field", "")
                made.append({**{name: row.get(name) for name in rules}, "row": number,
                             "group": path.stem if group == "file" else str(row.get(group, "")),
                             "is_shot": split == said.get("shots_file")})
    if all(row["is_shot"] for row in made):
        raise UserError(f"--data-dir: {', '.join(map(str, (data_files or {}).values()))}: no questions are "
                        "there")
    return {TEST: made}


def renamed(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a row whose fields have the task's names; publishers differ in them."""
    found = dict(row)
    for name, others in aliases.items():
        other = next((other for other in others if name not in found and other in found), None)
        if other is not None:
            found[name] = found.pop(other)
    return found


def problem(name: str, rule: str, row: Mapping[str, Any]) -> str:
    """Return what is wrong with a row's field, or an empty text.

    Args:
        name: of the field.
        rule: such as `text`, `texts 4`, `integer 0..3`, `letter A..D`, each also with `or null`.
        row: of the data.
    """
    match = _RULE.fullmatch(rule)
    assert match is not None, rule
    kind, low, high, value = match["kind"], match["low"], match["high"], row.get(name)
    if value is None:
        return "" if match["optional"] else f"has no {name!r}"

    def within(of: Any) -> bool:
        return low is None or type(of)(low) <= of <= type(of)(high or low)

    is_text = isinstance(value, str)
    fits = {"text": is_text and bool(value.strip()), "string": is_text,
            "texts": isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value),
            "integer": type(value) is int, "letter": is_text and len(value) == 1 and "A" <= value <= "J",
            "value": type(value) in (int, float) or (is_text and bool(value.strip())),
            "list": isinstance(value, list) and bool(value), "object": isinstance(value, dict), "any": True}
    span = "" if low is None else f" from {low} to {high}" if high else f" of {low}"
    fit = fits[kind] and within(len(value) if kind == "texts" else value)
    return "" if fit else f"{name} = {value!r:.60} must be {_TOLD[kind]}{span}"


# The source of functions that task files name is part of a task's hash: a change parts new scores from old.
def questions(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Return the rows that are asked (`process_docs`)."""
    return TaskRows(row for row in rows if not row["is_shot"])


def shots(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Return the rows that are shown (`process_docs` of the examples)."""
    return TaskRows(row for row in rows if row["is_shot"])


def gpqa_docs(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Return GPQA's rows with their options in an order that follows from the question, so that it is the
    same wherever the data are read."""
    return TaskRows({**row, **_gpqa(row)} for row in questions(rows))


def _gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    # cleaned as lm-eval's gpqa tasks clean them
    options = [row[name].strip().replace(" [title]", ". ").replace("  ", " ") for name in (
        "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")]
    order = list(range(4))
    random.Random(hashlib.sha256(row["Question"].encode()).hexdigest()).shuffle(order)
    return {"question": row["Question"], "options": [options[i] for i in order],
            "answer": LETTERS[order.index(3)]}


class GroupShots(ContextSampler):
    """The first examples of the group of the question that is asked."""

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None,
               df: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> Sequence[dict[str, Any]]:
        """Return the first n examples of a question's group."""
        group = (eval_doc or {}).get("group")
        found = [shot for shot in (df or self.df) if shot["group"] == group][:n]
        if len(found) < n:
            raise UserError(f"--num-fewshot {n}: the data have {len(found)} examples of {group!r}; ask for "
                            "fewer")
        return found
