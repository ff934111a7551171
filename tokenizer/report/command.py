"""`sov-tokenizer report`: everything about one tokenizer, as a page and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.artifacts import sha256_file, to_json, write_output
from megatron_sov.errors import UserError, nearest
from megatron_sov.outputs import check_output
from tokenizer.formats.loaders import open_tokenizer
from tokenizer.report.texts import DEFAULT_MB, read_texts

DESCRIPTION = """Check a tokenizer and write what was found as one HTML file that opens without a network.

Each check has a verdict (good, note, bad), numbers and examples. Give held-out text, one --text for each
language or domain, to see bytes per token, the cost in context, and tokens that are never used."""


TOKENIZER_HELP = ("a folder, a tokenizer.json, a sentencepiece .model, or a .tiktoken file with its pat_str "
                  "in FILE.tiktoken.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER",
                        help=TOKENIZER_HELP)
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="REPORT.html", help="the page to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here too")
    parser.add_argument("--skip", action="append", default=[], metavar="CHECK",
                        help="leave a check out; repeat it")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that name held-out text."""
    parser.add_argument("--text", action="extend", nargs="+", default=[], metavar="[NAME=]PATH",
                        help="held-out text: a text file, .jsonl, .parquet or a folder of them, "
                             "one for each language or domain")
    parser.add_argument("--max-text-mb", type=float, default=DEFAULT_MB, metavar="MB",
                        help="most text of each that is read, spread evenly over its files (default "
                             f"{DEFAULT_MB:g})")


def run(args: argparse.Namespace) -> int:
    """Run `sov-tokenizer report`; returns 0.

    Raises:
        UserError: the tokenizer or a text cannot be read, a check is unknown,
            or the output cannot be written.
    """
    from tokenizer.report.everything import CHECKS, check_all
    from tokenizer.report.page import render

    for name in args.skip:
        if name not in CHECKS:
            raise UserError(f"--skip {name}: is no check{nearest(name, CHECKS)} (checks: "
                            f"{', '.join(CHECKS)})")
    check_output("--output", args.output)
    check_output("--json", args.json)
    opened = open_tokenizer(args.tokenizer)
    checks = check_all(opened, read_texts(args.text, args.max_text_mb), args.skip)
    for check in checks:
        print(f"{check.verdict:>4}  {check.title}: {check.summary}")
    write_output(args.output, render(opened, checks))
    if args.json is not None:
        found = {c.name: {"title": c.title, "verdict": c.verdict, "summary": c.summary, "numbers": c.numbers}
                 for c in checks}
        facts = {"tokenizer": str(args.tokenizer), "library": opened.library, "vocab_size": opened.vocab_size,
                 "sha256": sha256_file(opened.file)}
        write_output(args.json, to_json(facts | {"checks": found}))
    print(f"{args.output}: opens in any browser without a network")
    return 0
