"""`sov-data unpaired`: pair judged responses with mismatched responses, for KTO (arXiv 2402.01306).

KTO estimates the divergence from the reference on mismatched responses, which should be the matched responses
in another order. Responses to a prompt are placed next to responses to the previous prompt, and responses to
the first prompt next to responses to the last. The column `desirable` is 1 for good responses, else 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from data_prep.responses.groups import KIND, TRUNCATED, GroupOptions, GroupTally, ResponseGroup, iter_groups
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import DeclaredCommand, Flag

FILE = "unpaired.jsonl"
Responses = list[list[dict[str, Any]]]
"""Messages per response."""


@dataclass(frozen=True, kw_only=True)
class UnpairedOptions(GroupOptions):
    """Turn judged responses into pairs for KTO, for `sov-data pack --format preference
    --column desirable`."""

    good_from: Annotated[float, Flag(value="REWARD")] = 0.5
    """Minimum reward for good responses; "label": true counts 1, false 0."""


def write_unpaired(options: UnpairedOptions) -> int:
    """Write an artifact of kind "corpus" with a record per response. Raises `UserError`, without output, for
    a malformed record, a single prompt, or missing good or bad responses."""
    check_output_folder(options.output, KIND, options.overwrite)
    tally = GroupTally()
    counts = tally.counts
    with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for group, mismatched in _iter_mismatched(iter_groups(options.input, tally), options.input):
                for record in _build_records(group, mismatched, options, tally):
                    tally.num_written += 1
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        # KTO weighs good responses against bad ones, so both are needed
        if not counts["good"] or not counts["bad"]:
            raise UserError(f"{', '.join(map(str, options.input))}: {counts['good']:,} responses are good (a "
                            f"reward of at least --good-from {options.good_from:g}) and {counts['bad']:,} "
                            "are bad, and both are needed; choose another --good-from, or add responses")
        account = tally.account("responses")
        artifact.content = {"responses": {f"num_{name}": counts[name]
                                          for name in ("good", "bad", "passed_over")},
                            "account": account.to_dict()}
        artifact.settings = {"good_from": options.good_from, "keep_unfinished": options.keep_unfinished}
    print(f"{counts['good']:,} good and {counts['bad']:,} bad responses")
    print(account.describe())
    return 0


UNPAIRED = DeclaredCommand(UnpairedOptions, write_unpaired)


def _build_records(group: ResponseGroup, mismatched: Responses, options: UnpairedOptions,
                   tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield a preference record per response: "chosen" is the response, good or bad, "rejected" the
    mismatched response. Good truncated responses are set aside unless `keep_unfinished`."""
    for i, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True)):
        is_good = reward >= options.good_from
        if is_good and not group.ended[i] and not options.keep_unfinished:
            tally.counts["passed_over"] += 1
            tally.set_aside[TRUNCATED] += 1
            continue
        tally.counts["good" if is_good else "bad"] += 1
        yield {**group.fields, **group.number_id(i), "prompt": group.prompt, "chosen": response,
               "rejected": mismatched[i], DESIRABLE: [float(is_good)] * 2}


def _iter_mismatched(groups: Iterable[ResponseGroup], files: Sequence[Path]
                     ) -> Iterator[tuple[ResponseGroup, Responses]]:
    """Yield groups with equally many responses to the previous prompt. The first prompt's groups come last,
    with responses to the last prompt."""
    first: list[ResponseGroup] = []
    previous: list[ResponseGroup] = []
    last: list[ResponseGroup] = []
    for _, prompt_groups in groupby((group for group in groups if group.responses),
                                    key=lambda group: group.prompt):
        previous, last = last, list(prompt_groups)
        if previous:
            yield from _match_responses(last, previous)
        else:
            first = last
    if not previous:
        raise UserError(f"{', '.join(map(str, files))}: all responses are to one prompt, or there are none; "
                        "KTO puts each beside a response to another prompt, so add prompts")
    # if the last groups repeat the first prompt, take the groups before them
    yield from _match_responses(first, last if last[0].prompt != first[0].prompt else previous)


def _match_responses(groups: list[ResponseGroup], others: list[ResponseGroup]
                     ) -> Iterator[tuple[ResponseGroup, Responses]]:
    """Yield groups with equally many responses of `others`, in order and cyclically."""
    responses = [response for group in others for response in group.responses]
    start = 0
    for group in groups:
        stop = start + len(group.responses)
        yield group, [responses[i % len(responses)] for i in range(start, stop)]
        start = stop
