"""`megatron-sov rl knowledge`: in-domain text for InK-GRPO, as `sov-data pack --format chat` takes it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from megatron_sov.artifacts import new_artifact, refuse_existing
from megatron_sov.digests import file_digest
from megatron_sov.errors import ExitCode, UserError

KIND, FILE = "corpus", "knowledge.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--input", type=Path, metavar="FILE.jsonl", nargs="+", action="extend", required=True,
                        help="records of the training split, a JSON object per line, each with a section's "
                             "text, or with `messages`, of which the assistant's turns are taken")
    parser.add_argument("--tests", type=Path, metavar="FILE.jsonl", nargs="+", action="extend", default=[],
                        help="the test's rows (needed): a section that shares ten words in a row with an "
                             "answer is left out")
    parser.add_argument("--answer-field", default="answer", metavar="FIELD",
                        help="field of a test's answer (default %(default)s)")
    parser.add_argument("--text-field", default="text", metavar="FIELD",
                        help="field of a section's text (default %(default)s); a dot leads into an object")
    parser.add_argument("--document-field", default="document", metavar="FIELD",
                        help="field that names what the section belongs to (default %(default)s)")
    parser.add_argument("--section-field", default="section", metavar="FIELD",
                        help="field that names the section (default %(default)s)")
    parser.add_argument("--records-in", default="", metavar="FIELD",
                        help="field of each record that holds a list of sections, e.g. a question's contexts")
    parser.add_argument("--split", metavar="FIELD=VALUE",
                        help="take only records with this value, e.g. split=train")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help=f"artifact to make: {FILE} and counts of what was left out, by reason")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")


def run(args: argparse.Namespace) -> int:
    """Write the text and say what was left out; returns 0.

    Raises:
        UserError: a bad file or argument, or no section is left; nothing is written then.
    """
    from megatron_sov.post.rl.knowledge import KEPT, Fields, answer_runs, sections

    if not args.tests:
        raise UserError("--tests: is missing; sections may hold the very answers that the model is judged "
                        "by, so each is compared with them and left out where it does; pass the rows of "
                        "that test")
    field, equals, value = (args.split or "").partition("=")
    if args.split is not None and not (field and equals and value):
        raise UserError(f"--split {args.split}: must be FIELD=VALUE, e.g. split=train")
    fields = Fields(args.text_field, args.document_field, args.section_field, args.records_in,
                    (field, value) if args.split is not None else None)
    refuse_existing(args.output, KIND, args.overwrite)
    answers, tests = answer_runs(args.tests, args.answer_field)
    counts: Counter[str] = Counter()
    with new_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for chat in sections(args.input, fields, answers, counts):
                out.write(json.dumps(chat) + "\n")
        told = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        if not counts[KEPT]:
            raise UserError(f"--input {', '.join(map(str, args.input))}: no section is left ({told}); name "
                            "its fields with --text-field, --document-field and --section-field")
        artifact.content = {"knowledge": dict(counts), "tests": dict(tests)}
        artifact.settings = {
            "fields": vars(fields), "answer_field": args.answer_field,
            **{name: {str(file): file_digest(file) for file in getattr(args, name)}
               for name in ("input", "tests")}}
    print(f"{args.output / FILE}: {told}")
    if tests["too_short"]:
        print(f"{tests['too_short']:,} of {tests['answers']:,} answers have fewer than ten words, and were "
              "not looked for")
    return ExitCode.OK
