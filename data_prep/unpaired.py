"""`sov-data unpaired`: single judged responses, each beside a response to another prompt (KTO, arXiv
2402.01306).

How far a model has gone from its reference in all is estimated on mismatched responses: each prompt is
followed by a response of the group before it, and those of the first group by one of the last.  Which is
which the column `desirable` says: 1 of responses that were judged good, 0 of the others.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.groups import INPUT, KIND, Group, add_group_arguments, read_groups
from megatron_sov.artifacts import new_artifact, refuse_existing
from megatron_sov.errors import UserError

HELP = "put each judged response beside one to another prompt, for KTO"
FILE = "unpaired.jsonl"
DESIRABLE = "desirable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Turn judged responses into the pairs that KTO learns from, for `sov-data pack "
                          "--format preference --column desirable`.  " + INPUT)
    add_group_arguments(parser, FILE)
    parser.add_argument("--good-from", type=float, default=0.5, metavar="REWARD",
                        help='a response with at least this reward is a good one; "label": true counts as 1, '
                             "false as 0 (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data unpaired`; returns 0."""
    write_unpaired(args.input, args.output, args.good_from, keep_unfinished=args.keep_unfinished,
                   overwrite=args.overwrite)
    return 0


def write_unpaired(files: list[Path], output: Path, good_from: float, *, keep_unfinished: bool = False,
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
    refuse_existing(output, KIND, overwrite)
    counts: Counter[str] = Counter()
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for group, other in _beside_another(chain.from_iterable(map(read_groups, files)), files):
                for record in records_of(group, other, good_from, keep_unfinished, counts):
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not counts["good"] or not counts["bad"]:
            raise UserError(f"{', '.join(map(str, files))}: {counts['good']:,} responses are good (a reward "
                            f"of at least --good-from {good_from:g}) and {counts['bad']:,} are bad, and both "
                            "are needed; choose another --good-from, or add responses")
        artifact.content = {"responses": {f"num_{name}": counts[name]
                                          for name in ("good", "bad", "passed_over")}}
        artifact.settings = {"good_from": good_from, "keep_unfinished": keep_unfinished}
    print(f"{counts['good']:,} good and {counts['bad']:,} bad responses; {counts['passed_over']:,} good ones "
          "that did not end are left out")


def records_of(group: Group, other: list[dict[str, Any]], good_from: float, keep_unfinished: bool,
               counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield a record for each response of a group, in the form of a preference.

    Args:
        group: with responses.
        other: messages of a response to another prompt.
        good_from: reward of good responses at least.
        keep_unfinished: whether good responses that did not end are learned.
        counts: of "good", "bad" and "passed_over" responses.
    """
    id_ = group.beside.get("id")
    for i, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True)):
        good = reward >= good_from
        if good and not group.ended[i] and not keep_unfinished:
            counts["passed_over"] += 1
            continue
        counts["good" if good else "bad"] += 1
        own = {"id": f"{id_}-{i}"} if isinstance(id_, (str, int)) else {}
        yield {**group.beside, **own, "prompt": group.prompt, "chosen": response, "rejected": other,
               DESIRABLE: [float(good)] * 2}


def _beside_another(groups: Iterable[Group],
                    files: list[Path]) -> Iterator[tuple[Group, list[dict[str, Any]]]]:
    """Yield each group with a response of the last one before it that has another prompt; the groups that
    have none before them come last, with one of the last other group."""
    first: list[Group] = []
    before: Group | None = None
    last: Group | None = None
    for group in groups:
        if not group.responses:
            continue
        if last is not None and group.prompt != last.prompt:
            before = last
        last = group
        if before is None:
            first.append(group)
        else:
            yield group, before.responses[-1]
    if before is None or last is None:
        raise UserError(f"{', '.join(map(str, files))}: all responses are to one prompt, or there are none; "
                        "KTO puts each beside a response to another prompt, so add prompts")
    for group in first:
        yield group, (last if last.prompt != group.prompt else before).responses[-1]
