"""Runs `megatron-sov rl knowledge`: writes text for InK-GRPO (arXiv 2601.18129) as chats with one assistant
turn, the input of `sov-data pack --format chat`."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.overlap import hash_runs
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import UserError
from megatron_sov.commands.rl.ssp.knowledge import KNOWLEDGE_KIND, KnowledgeOptions

KNOWLEDGE_FILE = "knowledge.jsonl"
INCLUDED, REPEATED, NO_TEXT, NO_NAME, DIFFERENT_SPLIT, IN_ANSWERS = (
    "kept", "repeated", "without_text", "without_document_or_section", "of_another_split", "in_test_answers")
"""Section outcomes: keys of the counts in the manifest."""


@dataclass(frozen=True)
class SectionFields:
    """Field names in a record; a dot leads into an object."""

    text: str = "text"
    """Field with the text; without it, the assistant turns in `messages` are the text."""
    document: str = "document"
    section: str = "section"
    inside: str = ""
    """Field with a list of records, e.g. a question's contexts; "": the row itself is the record."""
    split: tuple[str, str] | None = None
    """Row field, and its value in training records; None: all rows."""


def write_knowledge(options: KnowledgeOptions) -> None:
    """Write knowledge.jsonl and print the counts by outcome."""
    fields = _read_fields(options)
    # Read the test first: sections with test answers must not be written.
    answers = read_answers(options.tests, options.answer_field)
    counts: Counter[str] = Counter()
    with create_artifact(options.output, KNOWLEDGE_KIND, overwrite=options.overwrite) as artifact:
        with open(artifact.path / KNOWLEDGE_FILE, "w", encoding="utf-8") as out:
            for chat in iter_sections(options.input, fields, answers.runs, counts):
                out.write(json.dumps(chat) + "\n")
        listed = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        # Raised inside the artifact's context, which deletes the incomplete artifact.
        if not counts[INCLUDED]:
            raise UserError(f"--input {', '.join(map(str, options.input))}: no section remains ({listed}); "
                            "set its fields with --text-field, --document-field and --section-field")
        artifact.content = {"knowledge": dict(counts), "tests": dict(answers.counts)}
        artifact.settings = {
            "fields": vars(fields), "answer_field": options.answer_field,
            "input": {str(file): hash_file(file) for file in options.input},
            "tests": {str(file): hash_file(file) for file in options.tests}}
    print(f"{options.output / KNOWLEDGE_FILE}: {listed}")
    if answers.counts["too_short"]:
        print(f"{answers.counts['too_short']:,} of {answers.counts['answers']:,} answers have fewer than ten "
              "words, and were not searched for")


def _read_fields(options: KnowledgeOptions) -> SectionFields:
    split = None
    if options.split is not None:
        name, _, value = options.split.partition("=")
        split = (name, value)
    return SectionFields(text=options.text_field, document=options.document_field,
                         section=options.section_field, inside=options.records_in, split=split)


@dataclass(frozen=True)
class TestAnswers:
    """Answers in --tests, as hashes of ten consecutive words."""

    runs: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    """`answers`, and answers that are `too_short` for ten words."""


def read_answers(files: Iterable[Path], name: str) -> TestAnswers:
    answers = TestAnswers()
    for file in files:
        check_rows(file, "--tests", "")
        for line, row in read_rows(file, "--tests", ""):
            answer = read_field(row, name)
            if not isinstance(answer, str) or not answer.strip():
                raise UserError(f"--tests {file}: line {line} has no text in {name!r}; set the answer field "
                                "with --answer-field")
            runs = set(hash_runs(answer))
            answers.counts["answers"] += 1
            answers.counts["too_short"] += not runs
            answers.runs.update(runs)
    return answers


def iter_sections(files: Iterable[Path], fields: SectionFields, answers: set[int], counts: Counter[str]
                  ) -> Iterator[dict[str, Any]]:
    """Yield a chat per included section.

    Args:
        files: JSON lines of records.
        fields: names of the records' fields.
        answers: hashes of ten words that no section may contain.
        counts: outcome -> sections; updated.
    """
    used_keys: set[str] = set()
    for file in files:
        check_rows(file, "--input", "")
        for line, row in read_rows(file, "--input", ""):
            for record in _list_records(row, fields, f"--input {file}: line {line}"):
                text, key = _read_text(record, fields), _build_key(record, fields)
                outcome = _judge_section(row, fields, text, key, used_keys, answers=answers)
                counts[outcome] += 1
                if outcome == INCLUDED:
                    assert key is not None
                    used_keys.add(key)
                    yield {"id": key, "messages": [{"role": "assistant", "content": text}]}


def _judge_section(row: Mapping[str, Any], fields: SectionFields, text: str, key: str | None,
                   used_keys: set[str], *, answers: set[int]) -> str:
    """Return `INCLUDED`, or the first reason that excludes a section."""
    if fields.split is not None and str(read_field(row, fields.split[0])) != fields.split[1]:
        return DIFFERENT_SPLIT
    if not text.strip():
        return NO_TEXT
    if key is None:
        return NO_NAME
    if key in used_keys:
        return REPEATED
    return INCLUDED if answers.isdisjoint(hash_runs(text)) else IN_ANSWERS


def _list_records(row: Mapping[str, Any], fields: SectionFields, place: str) -> list[Mapping[str, Any]]:
    if not fields.inside:
        return [row]
    records = read_field(row, fields.inside)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{place}: {fields.inside} is not a list of objects; pass its field with "
                        "--records-in, or leave it out")
    return records


def _read_text(record: Mapping[str, Any], fields: SectionFields) -> str:
    """Return a section's text: its own field, or the assistant turns in `messages`."""
    text, messages = read_field(record, fields.text), record.get("messages")
    if text is None and isinstance(messages, list):
        turns = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
        return "\n\n".join(content for content in turns if isinstance(content, str))
    return text if isinstance(text, str) else ""


def _build_key(record: Mapping[str, Any], fields: SectionFields) -> str | None:
    """Return document and section in one name; None if a name is missing."""
    names = [read_field(record, name) for name in (fields.document, fields.section)]
    if not all(isinstance(name, (str, int)) and str(name).strip() for name in names):
        return None
    return " / ".join(str(name).strip() for name in names)


def read_field(record: Mapping[str, Any], name: str) -> Any:
    """Return a field's value, or None; `metadata.section` leads into an object."""
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
