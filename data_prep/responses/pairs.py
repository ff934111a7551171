"""`sov-data pairs`: pair the best and the worst response to a prompt (West-of-N, arXiv 2401.12086).

A truncated response may be the worst, never the best.
"""

from collections.abc import Iterator
from typing import Any

from data_prep.responses.groups import TRUNCATED, GroupOptions, GroupTally, ResponseGroup, write_groups
from megatron_sov.base.documents.groups import choose_pair
from megatron_sov.base.settings import DeclaredCommand

FILE = "pairs.jsonl"


class PairOptions(GroupOptions):
    """Turn groups of judged responses into pairs (best, worst), for `sov-data pack --format preference`."""


def build_pair(group: ResponseGroup, tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield the group's pair, if any, and count the remaining responses in `set_aside`."""
    pair, passed_over = choose_pair(
        group.rewards, group.ended, lambda i, j: group.responses[i] == group.responses[j])
    tally.counts["passed_over"] += passed_over
    reason = "neither best nor worst" if pair else "no better response that ended, or the same text"
    tally.set_aside.update(reason if ended else TRUNCATED
                           for i, ended in enumerate(group.ended) if i not in (pair or ()))
    if pair is not None:
        best, worst = pair
        yield {**group.fields, "prompt": group.prompt, "chosen": group.responses[best],
               "rejected": group.responses[worst]}


PAIRS = DeclaredCommand(PairOptions, lambda options: write_groups(options, FILE, build_pair, 2))
