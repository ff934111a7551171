"""`sov-data pairs`: of each prompt's judged responses the best and the worst, as a preference (West-of-N,
arXiv 2401.12086)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from data_prep.groups import INPUT, Group, add_group_arguments, write_groups

HELP = "pair the best and the worst of each prompt's judged responses"
FILE = "pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Turn groups of judged responses into pairs of the best and the worst, for "
                          "`sov-data pack --format preference`.  " + INPUT)
    add_group_arguments(parser, FILE)


def run(args: argparse.Namespace) -> int:
    """Run `sov-data pairs`; returns 0."""
    write_groups(args.input, args.output, FILE, pair_of, overwrite=args.overwrite)
    return 0


def pair_of(group: Group) -> Iterator[dict[str, Any]]:
    """Yield a group's pair; the first of equals is taken.  Nothing of a text that was rewarded in two ways,
    as one that two rows of tokens stand for may be."""
    best, worst = (group.responses[group.rewards.index(pick(group.rewards))] for pick in (max, min))
    if best != worst:
        yield {**group.beside, "prompt": group.prompt, "chosen": best, "rejected": worst}
