"""`sov-tokenizer report`: everything about one tokenizer, as a page and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.artifacts import atomic_write, disk_errors, sha256_file, to_json
from megatron_sov.errors import UserError, nearest
from tokenizer.formats.loaders import open_tokenizer
from tokenizer.report.texts import DEFAULT_MB, read_texts

HELP = "check a tokenizer and write what was found as a page"
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
    prepare_output(args.output, "--output")
    prepare_output(args.json, "--json")
    opened = open_tokenizer(args.tokenizer)
    checks = check_all(opened, read_texts(args.text, args.max_text_mb), args.skip)
    for check in checks:
        print(f"{check.verdict:>4}  {check.title}: {check.summary}")
    atomic_write(args.output, render(opened, checks))
    if args.json is not None:
        found = {c.name: {"title": c.title, "verdict": c.verdict, "summary": c.summary, "numbers": c.numbers}
                 for c in checks}
        facts = {"tokenizer": str(args.tokenizer), "library": opened.library, "vocab_size": opened.vocab_size,
                 "sha256": sha256_file(opened.file)}
        atomic_write(args.json, to_json(facts | {"checks": found}))
    print(f"{args.output}: opens in any browser without a network")
    return 0


def prepare_output(path: Path | None, option: str) -> None:
    """Make the folder of a file that will be written.

    Raises:
        UserError: the path is a folder, or its own folder cannot be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name the file to write, e.g. {path / 'report.html'}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
