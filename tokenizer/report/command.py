"""`sov-tokenizer report`: everything about one tokenizer, as a page and as JSON."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import sha256_file, to_json, write_output
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, add_options, read_options
from tokenizer.formats.loaders import open_tokenizer
from tokenizer.report.measures import HeldoutTextOptions, TokenizerPath, read_texts


@dataclass(frozen=True, kw_only=True)
class TokenizerReportOptions(HeldoutTextOptions):
    """Check a tokenizer and write what was found as one HTML file that opens without a network.

    Each check has a verdict (good, note, bad), numbers and examples. Give held-out text, one --text for each
    language or domain, to see bytes per token, the cost in context, and tokens that are never used."""

    tokenizer: TokenizerPath
    output: Annotated[Path, Flag(value="REPORT.html")]
    """The page to write."""
    json: Annotated[Path | None, Flag(value="FILE", writes=True)] = None
    """Write all numbers here too."""
    skip: Annotated[tuple[str, ...], Flag(value="CHECK")] = ()
    """Leave a check out; repeat it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser, TokenizerReportOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer report`; returns 0.

    Raises:
        UserError: the tokenizer or a text cannot be read, a check is unknown,
            or the output cannot be written.
    """
    from tokenizer.report.charts import render
    from tokenizer.report.everything import CHECKS, check_all

    args = read_options(TokenizerReportOptions, typed)
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
        facts = {"tokenizer": str(args.tokenizer), "library": opened.library,
                 "vocab_size": opened.vocab_size, "sha256": sha256_file(opened.file)}
        write_output(args.json, to_json(facts | {"checks": found}))
    print(f"{args.output}: opens in any browser without a network")
    return 0
