"""`sov-data pairs`: of each prompt's judged responses the best and the worst, as a preference (West-of-N,
arXiv 2401.12086).  One that did not end may be the worst, and is never the best."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from data_prep.responses.groups import INPUT, NOT_ENDED, GroupOptions, GroupTally, ResponseGroup, write_groups
from megatron_sov.base.documents import groups
from megatron_sov.base.settings import add_options, read_options

FILE = "pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Turn groups of judged responses into pairs of the best and the worst, for "
                          "`sov-data pack --format preference`.  " + INPUT)
    add_options(parser, GroupOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(GroupOptions, typed)
    write_groups(args.input, args.output, FILE, pair_of, 2, keep_unfinished=args.keep_unfinished,
                 overwrite=args.overwrite)
    return 0


def pair_of(group: ResponseGroup, tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield the pair of a group, if it has one, and count the responses outside of the pair as set aside."""
    pair, passed_over = groups.choose_pair(
        group.rewards, group.ended, lambda i, j: group.responses[i] == group.responses[j])
    tally.counts["passed_over"] += passed_over
    other = "neither best nor worst" if pair else "no better response that ended, or the same text"
    tally.set_aside.update(other if ended else NOT_ENDED
                           for i, ended in enumerate(group.ended) if i not in (pair or ()))
    if pair is not None:
        best, worst = pair
        yield {**group.beside, "prompt": group.prompt, "chosen": group.responses[best],
               "rejected": group.responses[worst]}
