"""`megatron-sov rl knowledge`: in-domain text for InK-GRPO, as `sov-data pack --format chat` takes it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.artifacts import new_artifact, refuse_existing
from megatron_sov.commands.shared_options import OverwriteOptions
from megatron_sov.digests import file_digest
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.settings import Bound, Breach, Code, Flag, add_options, read_options

KIND, FILE = "corpus", "knowledge.jsonl"


def _no_split(text: str) -> Breach | None:
    return None if all(text.partition("=")) else (Code.FORM, "must be FIELD=VALUE", "e.g. split=train")


@dataclass(frozen=True, kw_only=True)
class KnowledgeOptions(OverwriteOptions):
    """Which sections are taken, and what they are held against."""

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
    from megatron_sov.post.rl.knowledge import KEPT, Fields, answer_runs, sections

    field, _, value = (options.split or "").partition("=")
    fields = Fields(options.text_field, options.document_field, options.section_field, options.records_in,
                    (field, value) if options.split is not None else None)
    refuse_existing(options.output, KIND, options.overwrite)
    answers, tests = answer_runs(options.tests, options.answer_field)
    counts: Counter[str] = Counter()
    with new_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for chat in sections(options.input, fields, answers, counts):
                out.write(json.dumps(chat) + "\n")
        told = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        if not counts[KEPT]:
            raise UserError(f"--input {', '.join(map(str, options.input))}: no section is left ({told}); "
                            "name its fields with --text-field, --document-field and --section-field")
        artifact.content = {"knowledge": dict(counts), "tests": dict(tests)}
        artifact.settings = {
            "fields": vars(fields), "answer_field": options.answer_field,
            **{name: {str(file): file_digest(file) for file in getattr(options, name)}
               for name in ("input", "tests")}}
    print(f"{options.output / FILE}: {told}")
    if tests["too_short"]:
        print(f"{tests['too_short']:,} of {tests['answers']:,} answers have fewer than ten words, and were "
              "not looked for")
    return ExitCode.OK
