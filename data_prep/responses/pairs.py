"""`sov-data pairs`: of each prompt's judged responses the best and the worst, as a preference (West-of-N,
arXiv 2401.12086).  One that did not end may be the worst, and is never the best."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_prep.responses.groups import INPUT, GroupOptions, ResponseGroup, write_groups
from megatron_sov.base.settings import add_options, read_options

FILE = "pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Turn groups of judged responses into pairs of the best and the worst, for "
                          "`sov-data pack --format preference`.  " + INPUT)
    add_options(parser, GroupOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(GroupOptions, typed)
    write_groups(args.input, args.output, FILE, pair_of, keep_unfinished=args.keep_unfinished,
                 overwrite=args.overwrite)
    return 0


def pair_of(group: ResponseGroup, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield a group's pair; the first of equals is taken.  Nothing where no response that ended is better
    than the worst, or of a text that was rewarded in two ways, as one that two rows of tokens stand for
    may be."""
    places = range(len(group.rewards))
    worst = min(places, key=lambda i: group.rewards[i])
    # Of equal rewards one that ended goes first.
    best = max(places, key=lambda i: (group.rewards[i], group.ended[i]))
    if not group.ended[best]:
        counts["passed_over"] += 1
        best = max((i for i in places if group.ended[i]), key=lambda i: group.rewards[i], default=worst)
    if group.rewards[best] > group.rewards[worst] and group.responses[best] != group.responses[worst]:
        yield {**group.beside, "prompt": group.prompt, "chosen": group.responses[best],
               "rejected": group.responses[worst]}
