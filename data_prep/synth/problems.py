"""Problems as people have them in JSON lines: a question, its answer where it is known, and choices."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem
from megatron_sov.base.documents import list_files
from megatron_sov.base.documents.files import JSONL_SUFFIXES
from megatron_sov.base.errors import UserError

TEXT_FIELDS = ("problem", "question", "query", "prompt", "instruction", "task", "messages", "text")
"""Fields that may hold a problem; the first that a record has is taken."""
MAX_CHARS = 20_000
"""Of a problem: a longer one is a document."""
MAX_CHOICES = 10
_ID = re.compile(r"[A-Za-z0-9:._/-]{1,150}", re.ASCII)


def read_problems(inputs: Sequence[Path], *, needs_answer: str = "") -> Iterator[GeneratorItem]:
    """Yield the problems of files, in order, with the fields `problem`, `answer` ("" where there is none),
    `choices` and `domain`; a line that says the same as one before it is passed over.

    Args:
        inputs: files of JSON lines, and folders of them.
        needs_answer: why each problem has to have an answer, for the sentence; empty: it need not.

    Raises:
        UserError: a line is no problem, or two that differ have one id.
    """
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in line_files(inputs):
        for where, record in read_objects(file):
            fields = _fields(record, where, needs_answer)
            id_ = stated_id(record, "\n".join([fields["problem"], *fields["choices"]]), where)
            # the same id with the same content is a repeated line; with other content it is a mistake
            before = seen.setdefault(id_, (where, fields))
            if before[0] != where:
                if before[1] != fields:
                    raise UserError(f"{where}: has the id {id_} of {before[0]} and says something else; give "
                                    "one of them another id")
                continue
            yield GeneratorItem(id_, fields, str(record.get("source") or file.stem),
                                str(record.get("licence") or record.get("license") or ""))


def line_files(inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of JSON lines of inputs: files, and those of folders; of a folder of `sov-data synth`
    what it has kept.

    Raises:
        UserError: a folder has none.
    """
    for path in inputs:
        files = [path]
        if path.is_dir():
            files = [file for file in list_files(path) if file.suffix.lower() in JSONL_SUFFIXES]
        if not files:
            raise UserError(f"{path}: holds no file of JSON lines (.jsonl); name one, or its folder")
        yield from files


def problem_text(record: Mapping[str, Any]) -> str | None:
    """Return the problem of a record: a field of text, or what the user says in its messages; None: it has
    none."""
    for name in TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, list):
            # the user alone: an assistant's turn could give the answer away
            said = [turn.get("content") for turn in value
                    if isinstance(turn, Mapping) and turn.get("role") == "user"]
            value = "\n\n".join(text for text in said if isinstance(text, str))
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _fields(record: Mapping[str, Any], where: str, needs_answer: str) -> dict[str, Any]:
    text = problem_text(record)
    if text is None:
        raise UserError(f"{where}: has a problem in none of the fields {', '.join(TEXT_FIELDS)} (fields: "
                        f"{', '.join(record) or 'none'}); add one")
    if len(text) > MAX_CHARS:
        raise UserError(f"{where}: its problem has {len(text):,} characters, and may have {MAX_CHARS:,}; "
                        "shorten it or remove the line")
    answer = _answer(record.get("answer"), where)
    if needs_answer and not answer:
        raise UserError(f"{where}: has no answer; {needs_answer}")
    choices = record.get("choices") or []
    if (not isinstance(choices, list) or len(choices) > MAX_CHOICES
            or not all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"{where}: choices = {str(choices)[:60]!r} must be a list of up to {MAX_CHOICES} "
                        "texts")
    return {"problem": text, "answer": answer, "choices": choices,
            "domain": str(record.get("domain") or "")[:100]}


def _answer(value: Any, where: str) -> str:
    if value is None:
        return ""
    # a bool is an int in Python, and no answer
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: answer = {str(value)[:60]!r} must be text or a number")
    return str(value).strip()


def stated_id(record: Mapping[str, Any], text: str, where: str) -> str:
    """Return the id of a record: its own, else one of its text.

    Raises:
        UserError: its own is none.
    """
    given = record.get("id")
    if given is None or given == "":
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if isinstance(given, (str, int)) and not isinstance(given, bool) and _ID.fullmatch(str(given)):
        return str(given)
    raise UserError(f"{where}: id = {str(given)[:60]!r} must be 1 to 150 of the letters, digits and :._/-; "
                    "change it, or leave it out")
