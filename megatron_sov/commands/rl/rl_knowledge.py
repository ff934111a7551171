"""`megatron-sov rl knowledge`: the text of InK-GRPO (arXiv 2601.18129), as `sov-data pack --format chat`
takes it: each section of each document once, as an assistant's turn alone.

Nothing of another split than training is taken, and nothing that shares a run of ten words with an answer of
the test.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import Bound, Flag, ProblemCode, Violation, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions

KIND, FILE = "corpus", "knowledge.jsonl"


def _no_split(text: str) -> Violation | None:
    return None if all(text.partition("=")) else (ProblemCode.FORM, "must be FIELD=VALUE", "e.g. split=train")


@dataclass(frozen=True, kw_only=True)
class KnowledgeOptions(OverwriteOptions):
    """Write sections of documents as text for InK-GRPO, without those in the tests."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE.jsonl", many=True)]
    """Records of the training split, a JSON object per line, each with a section's text, or with
    `messages`, of which the assistant's turns are taken."""
    tests: Annotated[tuple[Path, ...], Flag(value="FILE.jsonl", many=True)]
    """The test's rows: a section that shares ten words in a row with an answer is left out."""
    answer_field: Annotated[str, Flag(value="FIELD")] = "answer"
    """Field of a test's answer."""
    text_field: Annotated[str, Flag(value="FIELD")] = "text"
    """Field of a section's text; a dot leads into an object."""
    document_field: Annotated[str, Flag(value="FIELD")] = "document"
    """Field that names what the section belongs to."""
    section_field: Annotated[str, Flag(value="FIELD")] = "section"
    """Field that names the section."""
    records_in: Annotated[str, Flag(value="FIELD")] = ""
    """Field of each record that holds a list of sections, e.g. a question's contexts."""
    split: Annotated[Annotated[str, Bound(_no_split)] | None, Flag(value="FIELD=VALUE")] = None
    """Take only records with this value, e.g. split=train."""
    output: Annotated[Path, Flag(value="DIR")]
    """Artifact to make: knowledge.jsonl and counts of what was left out, by reason."""


add_arguments = partial(add_options, cls=KnowledgeOptions)


def run(args: argparse.Namespace) -> int:
    """Write the text and say what was left out; returns 0.

    Raises:
        UserError: a bad file or argument, or no section is left; nothing is written then.
    """
    options = read_options(KnowledgeOptions, args)
    field, _, value = (options.split or "").partition("=")
    fields = Fields(options.text_field, options.document_field, options.section_field, options.records_in,
                    (field, value) if options.split is not None else None)
    check_output_folder(options.output, KIND, options.overwrite)
    # the test is read first: no section is written before it is known what must not be in it
    answers, tests = answer_runs(options.tests, options.answer_field)
    counts: Counter[str] = Counter()
    with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for chat in sections(options.input, fields, answers, counts):
                out.write(json.dumps(chat) + "\n")
        told = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        # inside the artifact's context: an error here leaves nothing behind
        if not counts[KEPT]:
            raise UserError(f"--input {', '.join(map(str, options.input))}: no section is left ({told}); "
                            "name its fields with --text-field, --document-field and --section-field")
        artifact.content = {"knowledge": dict(counts), "tests": dict(tests)}
        artifact.settings = {
            "fields": vars(fields), "answer_field": options.answer_field,
            **{name: {str(file): hash_file(file) for file in getattr(options, name)}
               for name in ("input", "tests")}}
    print(f"{options.output / FILE}: {told}")
    if tests["too_short"]:
        print(f"{tests['too_short']:,} of {tests['answers']:,} answers have fewer than ten words, and were "
              "not looked for")
    return ExitCode.OK


KEPT, REPEATED, NO_TEXT, NO_NAME, OTHER_SPLIT, IN_ANSWERS = (
    "kept", "repeated", "without_text", "without_document_or_section", "of_another_split", "in_test_answers")
"""What becomes of a section."""


@dataclass(frozen=True)
class Fields:
    """Where a record has what; a dot leads into an object."""

    text: str = "text"
    """The section's text; a record without it may have `messages`, whose assistant's turns are taken."""
    document: str = "document"
    """What the section belongs to."""
    section: str = "section"
    """What tells it from others of the document."""
    inside: str = ""
    """Field with a list of such records, as a question's contexts; empty: the record itself is one."""
    split: tuple[str, str] | None = None
    """Field, and its value in records to train on; None: all are."""


def answer_runs(files: Iterable[Path], field: str) -> tuple[set[int], Counter[str]]:
    """Return the runs of words of all answers, and counts of `answers` and of those that are `too_short` to
    have one.

    Raises:
        UserError: a file cannot be read, or a row has no answer.
    """
    from megatron_sov.base.documents.overlap import hash_runs

    found: set[int] = set()
    counts: Counter[str] = Counter()
    for file in files:
        check_rows(file, "--tests", "")
        for line, row in read_rows(file, "--tests", ""):
            answer = value_at(row, field)
            if not isinstance(answer, str) or not answer.strip():
                raise UserError(f"--tests {file}: line {line} has no text in {field!r}; name the field of "
                                "the answers with --answer-field")
            before = set(hash_runs(answer))
            counts["answers"] += 1
            counts["too_short"] += not before
            found |= before
    return found, counts


def sections(files: Iterable[Path], fields: Fields, answers: set[int], counts: Counter[str]
             ) -> Iterator[dict[str, Any]]:
    """Yield a chat for each section that is kept, and count what became of all.

    Args:
        files: of records.
        fields: where they have what.
        answers: runs that no section may hold.
        counts: is added to.

    Raises:
        UserError: a file cannot be read, or a line is no JSON object.
    """
    seen: set[str] = set()
    for file in files:
        check_rows(file, "--input", "")
        for line, row in read_rows(file, "--input", ""):
            for record in _records(row, fields, f"--input {file}: line {line}"):
                text, key = _text(record, fields), _key(record, fields)
                became = _became(row, fields, text, key, seen, answers)
                counts[became] += 1
                if became == KEPT:
                    assert key is not None
                    seen.add(key)
                    yield {"id": key, "messages": [{"role": "assistant", "content": text}]}


def _became(row: Mapping[str, Any], fields: Fields, text: str, key: str | None, seen: set[str],
            answers: set[int]) -> str:
    from megatron_sov.base.documents.overlap import hash_runs

    # in the order of the reasons that are told: a section counts for the first that applies
    if fields.split is not None and str(value_at(row, fields.split[0])) != fields.split[1]:
        return OTHER_SPLIT
    if not text.strip():
        return NO_TEXT
    if key is None:
        return NO_NAME
    if key in seen:
        return REPEATED
    # runs of ten words
    return KEPT if answers.isdisjoint(hash_runs(text)) else IN_ANSWERS


def _records(row: Mapping[str, Any], fields: Fields, where: str) -> list[Mapping[str, Any]]:
    if not fields.inside:
        return [row]
    inside = value_at(row, fields.inside)
    if not isinstance(inside, list) or not all(isinstance(record, dict) for record in inside):
        raise UserError(f"{where}: {fields.inside} is no list of objects; name the field that is with "
                        "--records-in, or leave it out")
    return inside


def _text(record: Mapping[str, Any], fields: Fields) -> str:
    """Return a section's text: its own field, or what the assistant says in a chat."""
    text, messages = value_at(record, fields.text), record.get("messages")
    if text is None and isinstance(messages, list):
        said = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
        return "\n\n".join(content for content in said if isinstance(content, str))
    return text if isinstance(text, str) else ""


def _key(record: Mapping[str, Any], fields: Fields) -> str | None:
    """Return document and section as one name, or None where one of the two is missing."""
    names = [value_at(record, field) for field in (fields.document, fields.section)]
    if not all(isinstance(name, (str, int)) and str(name).strip() for name in names):
        return None
    return " / ".join(str(name).strip() for name in names)


def value_at(record: Mapping[str, Any], field: str) -> Any:
    """Return what a record has in a field, or None: `metadata.section` leads into an object."""
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
