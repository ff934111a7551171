"""`megatron-sov score --reward NAME --input ROWS.jsonl --output OUT.jsonl`: answers to rewards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_sov.artifacts import write_output
from megatron_sov.documents.visible import visible
from megatron_sov.errors import ExitCode, GateFailed, UserError
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.outputs import check_output
from megatron_sov.rewards.opinions import read_opinions
from megatron_sov.rewards.registry import BUILT_IN, make, order
from megatron_sov.rewards.rows import check_rows
from megatron_sov.rewards.running import default_workers
from megatron_sov.rewards.scoring import Summary, score_file
from megatron_sov.rewards.tally import MAX_TOLD
from megatron_sov.settings import parse_nested

TOLD_STRINGS = 3
"""Of those that give answers away, in an alarm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov score`."""
    parser.add_argument("--reward", required=True, metavar="NAME",
                        help=f"{', '.join(BUILT_IN)}, or a class of your own, FILE.py:NAME")
    parser.add_argument("--input", type=Path, required=True, metavar="ROWS.jsonl",
                        help="a JSON object per line, with `response` and what the reward needs")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl",
                        help="the same rows with reward, status, components, reason, reward_version")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="key=value",
                        help="a setting of the reward, e.g. max_length=4096; may be repeated")
    parser.add_argument("--disagreements", type=Path, metavar="PAGE.html",
                        help="with a second opinion (reward composed): also write a page on where the two "
                             "disagree")
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N",
                        help="processes that judge (default: one for each core)")


def run(args: argparse.Namespace) -> int:
    """Score all rows; the output appears when all are there; the same command continues a killed one.

    Raises:
        UserError: no such reward or setting, bad rows, or nothing can be written there.
        GateFailed: all is written, and not one row has a reward.
    """
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    asked = order(args.reward, parse_nested(args.settings))
    made = make(asked)
    check_output("--output", args.output)
    check_output("--disagreements", args.disagreements)
    has_second = getattr(made.reward, "second", None) is not None
    if args.disagreements is not None and not has_second:
        raise UserError(f"--disagreements {args.disagreements}: --reward {args.reward} asks for no second "
                        "opinion; use --reward composed with --set second.reward=NAME --set second.of=PART")
    if args.output.exists() and args.input.exists() and os.path.samefile(args.input, args.output):
        raise UserError(f"--output {args.output}: is the --input; name another file")
    num_rows = check_rows(args.input)
    with work_bar("score", num_rows, "row") as bar:
        summary = score_file(asked, made, args.input, args.output, args.workers, bar.update)
    tell(summary, args.reward, made.version, args.output)
    if has_second:
        _tell_disagreements(args.output, made.version, args.disagreements)
    if summary.without_any:
        raise GateFailed(f"{args.output}: not one of its {num_rows:,} rows has a reward; see why "
                         "in their `reason`")
    return ExitCode.OK


def _tell_disagreements(output: Path, version: str, page: Path | None) -> None:
    """Say where two verifiers disagree, in all rows of the output, and whether that is an alarm."""
    opinions = read_opinions(output)
    others = opinions.disagreeing
    lines = ", ".join(map(str, others[:MAX_TOLD])) + (", ..." if len(others) > MAX_TOLD else "")
    print(f"second opinion: {len(others):,} of {opinions.num_opinions:,} rows disagree"
          + (f" (lines {lines})" if lines else ""))
    if opinions.alarm:
        strings = ", ".join(repr(s.text) for s in opinions.strings()[:TOLD_STRINGS])
        print(visible(f"ALARM {opinions.told()}" + (f"; look at answers with {strings}" if strings else "")),
              file=sys.stderr)
    if page is not None:
        from megatron_sov.rewards.opinion_page import page_of

        write_output(page, page_of(opinions, output.name, version))


def tell(summary: Summary, name: str, version: str, output: Path) -> None:
    """Say what became of the rows, and why some have no reward."""
    if summary.num_kept:
        print(f"{summary.num_kept:,} rows were scored by an earlier command and are kept")
    for text in summary.tally.told:
        print(visible(text), file=sys.stderr)
    print(f"{output}: {name} {version}: {summary.tally.line('rows')}")
