"""`sov-data unpaired`: single judged responses, each beside a response to another prompt (KTO, arXiv
2402.01306).

How far a model has gone from its reference in all is estimated on mismatched responses, which ought to be
the same ones as the matched: the responses to a prompt stand beside those to the prompt before it, one by
one, and those to the first prompt beside those to the last.  The column `desirable` says which are good: 1 of
responses that were judged good, 0 of the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from data_prep.responses.groups import (
    INPUT, KIND, NOT_ENDED, GroupOptions, GroupTally, ResponseGroup, read_groups)
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options

FILE = "unpaired.jsonl"


@dataclass(frozen=True, kw_only=True)
class UnpairedOptions(GroupOptions):
    """Turn judged responses into what KTO learns from."""

    good_from: Annotated[float, Flag(value="REWARD")] = 0.5
    """A response with at least this reward is a good one; "label": true counts as 1, false as 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Turn judged responses into the pairs that KTO learns from, for `sov-data pack "
                          "--format preference --column desirable`.  " + INPUT)
    add_options(parser, UnpairedOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(UnpairedOptions, typed)
    write_unpaired(args.input, args.output, args.good_from, keep_unfinished=args.keep_unfinished,
                   overwrite=args.overwrite)
    return 0


def write_unpaired(files: Sequence[Path], output: Path, good_from: float, *, keep_unfinished: bool = False,
                   overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with a record for each response.

    Args:
        files: of groups; one response is a group, too.
        output: the artifact.
        good_from: reward of good responses at least.
        keep_unfinished: take every response for one that ended; else good ones that did not are left out.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: a record breaks a rule, all have one prompt, or nothing is good; nothing is written then.
    """
    check_output_folder(output, KIND, overwrite)
    tally = GroupTally()
    counts = tally.counts
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            found = (group for path in files for group in read_groups(path, tally))
            for group, others in _beside_another(found, files):
                for record in records_of(group, others, good_from, keep_unfinished, tally):
                    tally.num_written += 1
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        # KTO weighs good against bad: with one of them there is nothing to learn.
        if not counts["good"] or not counts["bad"]:
            raise UserError(f"{', '.join(map(str, files))}: {counts['good']:,} responses are good (a reward "
                            f"of at least --good-from {good_from:g}) and {counts['bad']:,} are bad, and both "
                            "are needed; choose another --good-from, or add responses")
        account = tally.account("responses")
        artifact.content = {"responses": {f"num_{name}": counts[name]
                                          for name in ("good", "bad", "passed_over")},
                            "account": account.to_dict()}
        artifact.settings = {"good_from": good_from, "keep_unfinished": keep_unfinished}
    print(f"{counts['good']:,} good and {counts['bad']:,} bad responses")
    print(account.describe())


def records_of(group: ResponseGroup, others: list[list[dict[str, Any]]], good_from: float,
               keep_unfinished: bool, tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield a record for each response of a group, in the form of a preference.

    Args:
        group: with responses.
        others: for each of them the messages of one to another prompt.
        good_from: reward of good responses at least.
        keep_unfinished: whether good responses that did not end are learned.
        tally: of "good", "bad" and "passed_over" responses; the last are set aside.
    """
    id_ = group.beside.get("id")
    for i, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True)):
        # The response is always "chosen": the column says whether it is good.
        good = reward >= good_from
        if good and not group.ended[i] and not keep_unfinished:
            tally.counts["passed_over"] += 1
            tally.set_aside[NOT_ENDED] += 1
            continue
        tally.counts["good" if good else "bad"] += 1
        own = {"id": f"{id_}-{i}"} if isinstance(id_, (str, int)) else {}
        yield {**group.beside, **own, "prompt": group.prompt, "chosen": response, "rejected": others[i],
               DESIRABLE: [float(good)] * 2}


def _beside_another(groups: Iterable[ResponseGroup],
                    files: Sequence[Path]) -> Iterator[tuple[ResponseGroup, list[list[dict[str, Any]]]]]:
    """Yield each group with responses to the prompt before its own, one for each of its responses; groups of
    the first prompt come last, with those to the last other one."""
    first: list[ResponseGroup] = []
    before: list[ResponseGroup] = []
    last: list[ResponseGroup] = []
    for _, run in groupby((group for group in groups if group.responses), key=lambda group: group.prompt):
        before, last = last, list(run)
        if before:
            yield from _one_by_one(last, before)
        else:
            first = last
    if not before:
        raise UserError(f"{', '.join(map(str, files))}: all responses are to one prompt, or there are none; "
                        "KTO puts each beside a response to another prompt, so add prompts")
    # The first prompt's responses wait for the last other prompt; if the last run has the first prompt again,
    # the one before it serves.
    yield from _one_by_one(first, last if last[0].prompt != first[0].prompt else before)


def _one_by_one(run: list[ResponseGroup], other: list[ResponseGroup]
                ) -> Iterator[tuple[ResponseGroup, list[list[dict[str, Any]]]]]:
    """Yield the groups of a prompt with responses to another one, in order and from the start again where
    these are fewer."""
    responses = [response for group in other for response in group.responses]
    place = 0
    for group in run:
        places = range(place, place + len(group.responses))
        yield group, [responses[i % len(responses)] for i in places]
        place = places.stop
