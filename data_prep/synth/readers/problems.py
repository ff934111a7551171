"""Reader `problems`: questions from JSON lines, with answer and choices if known."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents import list_files
from megatron_sov.base.documents.files import JSONL_SUFFIXES, get_ending
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError

TEXT_FIELDS = ("problem", "question", "query", "prompt", "instruction", "task", "messages", "text")
"""Fields that may hold a problem; the first non-empty field counts."""
MAX_CHARS = 20_000
"""Maximum for a problem; longer texts count as documents."""
MAX_CHOICES = 10
_ID = re.compile(r"[A-Za-z0-9:._/-]{1,150}", re.ASCII)


def read_problems(inputs: Sequence[Path], *, needs_answer: str = "") -> Iterator[GeneratorItem]:
    """Yield problems with the fields `problem`, `answer` ("" if unknown), `choices` and `domain`, each
    problem once.

    Args:
        inputs: files of JSON lines, and folders with such files.
        needs_answer: reason why every problem needs an answer, for the message; "": answers are optional.

    Raises:
        UserError: a line is no problem, or two different problems share an id.
    """
    problems: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in list_line_files(inputs):
        for place, record in read_records(file):
            fields = _read_fields(record, place, needs_answer)
            problem_id = get_record_id(record, "\n".join([fields["problem"], *fields["choices"]]), place)
            # equal content is a repeated line, different content a mistake
            first_place, first_fields = problems.setdefault(problem_id, (place, fields))
            if first_place != place:
                if first_fields != fields:
                    raise UserError(f"{place}: has the id {problem_id} of {first_place} and says something "
                                    "else; give one of them another id")
                continue
            yield GeneratorItem(problem_id, fields, str(record.get("source") or file.stem),
                                str(record.get("licence") or record.get("license") or ""))


def list_line_files(inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield input files, and JSONL files in input folders; from `sov-data synth` only `kept.jsonl`."""
    for path in inputs:
        files = [path]
        if path.is_dir():
            files = [file for file in list_files(path) if get_ending(file.name) in JSONL_SUFFIXES]
        if not files:
            raise UserError(f"{path}: holds no file of JSON lines (.jsonl); name one, or its folder")
        yield from files


def get_problem_text(record: Mapping[str, Any], place: str) -> str:
    """Return the first problem in `TEXT_FIELDS`: a text, or the user's turns in `messages`. Raises
    `UserError`: no field holds a problem."""
    for name in TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, list):
            # without the assistant's turns, which could give the answer away
            turns = [turn.get("content") for turn in value
                     if isinstance(turn, Mapping) and turn.get("role") == "user"]
            value = "\n\n".join(text for text in turns if isinstance(text, str))
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise UserError(f"{place}: has a problem in none of the fields {', '.join(TEXT_FIELDS)} (fields: "
                    f"{', '.join(record) or 'none'}); add one")


def _read_fields(record: Mapping[str, Any], place: str, needs_answer: str) -> dict[str, Any]:
    text = get_problem_text(record, place)
    if len(text) > MAX_CHARS:
        raise UserError(f"{place}: its problem has {len(text):,} characters, and may have {MAX_CHARS:,}; "
                        "shorten it or remove the line")
    answer = _read_answer(record.get("answer"), place)
    if needs_answer and not answer:
        raise UserError(f"{place}: has no answer; {needs_answer}")
    choices = record.get("choices") or []
    if (not isinstance(choices, list) or len(choices) > MAX_CHOICES
            or not all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"{place}: choices = {str(choices)[:60]!r} must be a list of up to {MAX_CHOICES} "
                        "texts")
    return {"problem": text, "answer": answer, "choices": choices,
            "domain": str(record.get("domain") or "")[:100]}


def _read_answer(value: Any, place: str) -> str:
    if value is None:
        return ""
    # bool is an int in Python, but true is not an answer
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{place}: answer = {str(value)[:60]!r} must be text or a number")
    return str(value).strip()


def get_record_id(record: Mapping[str, Any], text: str, place: str) -> str:
    """Return the record's `id`, or else hash `text`; raises `UserError` for an invalid `id`."""
    record_id = record.get("id")
    if record_id is None or record_id == "":
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if isinstance(record_id, (str, int)) and not isinstance(record_id, bool) and _ID.fullmatch(
            str(record_id)):
        return str(record_id)
    raise UserError(f"{place}: id = {str(record_id)[:60]!r} must be 1 to 150 of the letters, digits and "
                    ":._/-; change it, or leave it out")
