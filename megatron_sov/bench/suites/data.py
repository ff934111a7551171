"""Read the data of our suites from the user's own copies.

Questions and few-shot examples form one split, because lm-eval passes the question to a few-shot sampler only
within a split. Task files name these functions by `!function`; their source enters `hash_task`, so that a
change separates new scores from old ones."""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.samplers import ContextSampler

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.task_rows import TaskRows, read_rows

TEST = "test"
LETTERS = "ABCDEFGHIJ"
_RULE = re.compile(r"(?P<kind>text|string|texts|integer|letter|value|list|object|any)"
                   r"(?: (?P<low>-?\d+|[A-J])(?:\.\.(?P<high>-?\d+|[A-J]))?)?(?P<optional> or null)?")
_KIND_TEXTS = {"text": "a text that is not empty", "string": "a text", "texts": "a list of texts",
               "integer": "a whole number", "letter": "a letter", "value": "a text or a number",
               "list": "a list that is not empty", "object": "an object", "any": "there"}


def load_rows(data_files: Mapping[str, Any] | None = None, sov: Mapping[str, Any] | None = None,
              **_: Any) -> dict[str, TaskRows]:
    """Load a task's rows for `custom_dataset`, with the further fields `group`, `row` (number) and `is_shot`.

    Args:
        data_files: split -> path or paths, from `dataset_kwargs`.
        sov: `metadata.sov`.

    Raises:
        UserError: a row breaks a rule in `fields`, or every row is an example.
    """
    settings = sov or {}
    rules, aliases = dict(settings.get("fields", {})), settings.get("aliases", {})
    group_field = settings.get("group_field", "")
    rows = TaskRows()
    for split, names in (data_files or {}).items():
        for path in map(Path, [names] if isinstance(names, str) else names):
            for number, raw in enumerate(read_rows(path), 1):
                row = rename_fields(raw, aliases)
                if problems := [text for name, rule in rules.items()
                                if (text := find_field_problem(name, rule, row))]:
                    raise UserError(f"--data-dir {path}: row {number}: {'; '.join(problems)}")
                group = path.stem if group_field == "file" else str(row.get(group_field, ""))
                rows.append({**{name: row.get(name) for name in rules}, "row": number, "group": group,
                             "is_shot": split == settings.get("shots_file")})
    if all(row["is_shot"] for row in rows):
        raise UserError(f"--data-dir: {', '.join(map(str, (data_files or {}).values()))}: contains no "
                        "questions; add the test split")
    return {TEST: rows}


def rename_fields(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Rename a publisher's fields to the task's; `aliases` maps a field to its other names."""
    renamed = dict(row)
    for name, others in aliases.items():
        alias = next((other for other in others if name not in renamed and other in renamed), None)
        if alias is not None:
            renamed[name] = renamed.pop(alias)
    return renamed


def find_field_problem(name: str, rule: str, row: Mapping[str, Any]) -> str:
    """Return a sentence if a field breaks its rule, such as `text`, `texts 4`, `integer 0..3`, `letter A..D`
    or `text or null`; else ""."""
    match = _RULE.fullmatch(rule)
    assert match is not None, rule
    kind, low, high, value = match["kind"], match["low"], match["high"], row.get(name)
    if value is None:
        return "" if match["optional"] else f"has no {name!r}"
    is_text = isinstance(value, str)
    fits_kind = {"text": is_text and bool(value.strip()), "string": is_text,
                 "texts": isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value),
                 "integer": type(value) is int, "letter": is_text and len(value) == 1 and "A" <= value <= "J",
                 "value": type(value) in (int, float) or (is_text and bool(value.strip())),
                 "list": isinstance(value, list) and bool(value), "object": isinstance(value, dict),
                 "any": True}[kind]
    limits = ""
    if fits_kind and low is not None:
        measured = len(value) if kind == "texts" else value
        fits_kind = type(measured)(low) <= measured <= type(measured)(high or low)
    if low is not None:
        limits = f" from {low} to {high}" if high else f" of {low}"
    return "" if fits_kind else f"{name} = {value!r:.60} must be {_KIND_TEXTS[kind]}{limits}"


def select_questions(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Return the rows without examples (`process_docs`)."""
    return TaskRows(row for row in rows if not row["is_shot"])


def select_shots(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Return the few-shot examples (`process_docs` in `fewshot_config`)."""
    return TaskRows(row for row in rows if row["is_shot"])


def shuffle_gpqa_options(rows: Sequence[dict[str, Any]]) -> TaskRows:
    """Add `options` and `answer` to GPQA's rows, in an order that depends only on the question."""
    return TaskRows({**row, **_build_gpqa_options(row)} for row in select_questions(rows))


def _build_gpqa_options(row: Mapping[str, Any]) -> dict[str, Any]:
    # cleaned as in lm-eval's gpqa tasks
    options = [row[name].strip().replace(" [title]", ". ").replace("  ", " ") for name in (
        "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")]
    order = list(range(4))
    random.Random(hashlib.sha256(row["Question"].encode()).hexdigest()).shuffle(order)
    return {"question": row["Question"], "options": [options[i] for i in order],
            "answer": LETTERS[order.index(3)]}


class GroupShots(ContextSampler):
    """Few-shot sampler: the first examples from the question's group."""

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None,
               df: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> Sequence[dict[str, Any]]:
        """Return n examples for `eval_doc`."""
        group = (eval_doc or {}).get("group")
        examples = [shot for shot in (df or self.df) if shot["group"] == group][:n]
        if len(examples) < n:
            raise UserError(f"--num-fewshot {n}: the data have {len(examples)} examples of {group!r}; ask "
                            "for fewer")
        return examples
