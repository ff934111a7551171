"""`sov-data groups`: responses to one prompt with their rewards, as chats with an advantage each (GrouPER).

K-EXAONE's technical report: of a group with rewards z, the sum of rule and rubric rewards, a response's
advantage is ``2 (z - min z) / (max z - min z) - 1``; a group whose rewards are all equal says nothing and is
left out.

A response that did not end (`finish_reason`: "length", as `megatron-sov generate` writes it) has its place in
the group, and is learned as a bad one only: a chat of it would end where its writer did not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from data_prep.json_lines import read_objects
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.accounting import RecordTally
from megatron_sov.base.documents.groups import are_equal, compute_group_advantages, should_train
from megatron_sov.base.documents.layouts import (
    KTO_TAG, LABEL, LABEL_WORDS, convert_layout, get_completion_field, parse_label, refuse_media,
    split_response)
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.documents.records import NUM_PROMPT_FIELD, is_float32
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options

INPUT = ('A line of the input is {"prompt": ..., "responses": [{"content": ..., "reward": 1.0}, ...]}; '
         "prompts and responses may be lists of messages.  Or it is one response: a row of `megatron-sov "
         "score`, or TRL's completion with a label; successive rows of one prompt are a group.")
KIND = "corpus"
FILE = "groups.jsonl"
ALONE, EQUAL_REWARDS, NOT_ENDED = "only response to its prompt", "equal rewards", "did not end"
"""Reasons for which responses are set aside."""
FINISH, LENGTH = "finish_reason", "length"
"""Field of a response that `megatron-sov generate` wrote, and its value where the response is as long as was
allowed."""
BESIDE = ("prompt", "system", "id", "tools", "chat_template_kwargs")
"""Fields of such a line that belong to its prompt."""
COLUMNS = ("advantage", "group_share")
"""Fields of a chat beside its messages: the advantage, and 1 / responses of its group.  With `NUM_PROMPT` its
group is held out as a whole, and so are all groups of one prompt."""


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """What every step over groups of judged responses takes."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A .jsonl file of groups, or of what `megatron-sov score` wrote; several may follow, and it may be
    repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder that is written."""
    keep_unfinished: bool = False
    """Let a response with "finish_reason": "length", which did not end, be learned as a good one too, with
    an end that it never had."""
    overwrite: bool = False
    """Replace a corpus that is already there."""


@dataclass
class GroupTally(RecordTally):
    """Counts of responses, read, written and set aside, and of groups."""

    counts: Counter[str] = field(default_factory=Counter)
    """"groups" with different rewards and their "responses"; groups "alone" and with "equal_rewards"; ..."""


@dataclass(frozen=True)
class ResponseGroup:
    beside: dict[str, Any]
    """The record's other fields, such as tools."""
    prompt: list[dict[str, Any]]
    """Its messages."""
    responses: list[list[dict[str, Any]]]
    """The messages of each response."""
    rewards: list[float]
    ended: list[bool]
    """Whether each ended by itself, or nothing says that it did not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn groups of judged responses into chats with an advantage each, for `sov-data pack --format chat "
        "--column advantage --column group_share`.  " + INPUT)
    add_options(parser, GroupOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(GroupOptions, typed)
    write_groups(args.input, args.output, FILE, chats_of, 1, keep_unfinished=args.keep_unfinished,
                 overwrite=args.overwrite)
    return 0


def write_groups(files: Sequence[Path], output: Path, file: str,
                 records_of: Callable[[ResponseGroup, GroupTally], Iterable[Any]], record_responses: int, *,
                 keep_unfinished: bool = False, overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with the records that `records_of` makes of each group.

    Args:
        files: of groups.
        output: the artifact.
        file: its file.
        records_of: a group whose rewards differ -> its records; counts the responses that it sets aside,
            and as "passed_over" those that would be learned as good ones if they had ended.
        record_responses: responses in a record.
        keep_unfinished: take every response for one that ended.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: a record breaks a rule, or no group gives a record; nothing is written then.
    """
    check_output_folder(output, KIND, overwrite)
    tally = GroupTally()
    counts = tally.counts
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        with open(artifact.path / file, "w", encoding="utf-8") as out:
            # One group is in memory at a time, and never a file.
            for group in (group for path in files for group in read_groups(path, tally)):
                # The advantage divides by the spread of rewards.
                if len(group.rewards) < 2 or are_equal(group.rewards):
                    is_alone = len(group.rewards) < 2
                    counts["alone" if is_alone else "equal_rewards"] += 1
                    tally.set_aside[ALONE if is_alone else EQUAL_REWARDS] += len(group.rewards)
                    continue
                counts["groups"] += 1
                counts["responses"] += len(group.rewards)
                counts["unfinished"] += group.ended.count(False)
                if keep_unfinished:
                    group = replace(group, ended=[True] * len(group.ended))
                for record in records_of(group, tally):
                    counts["records"] += 1
                    tally.num_written += record_responses
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        _refuse_nothing(files, counts)
        account = tally.account("responses")
        artifact.content = {"groups": {f"num_{name}": counts[name] for name in (
            "groups", "responses", "equal_rewards", "alone", "unfinished", "passed_over")},
            "account": account.to_dict()}
    print(f"{counts['groups']:,} groups of {counts['responses'] / counts['groups']:.1f} responses, of which "
          f"{counts['unfinished']:,} did not end")
    print(account.describe())


def _left_out(counts: Counter[str]) -> str:
    return f"{counts['equal_rewards']:,} with equal rewards and {counts['alone']:,} of one response"


def _refuse_nothing(files: Sequence[Path], counts: Counter[str]) -> None:
    named = ", ".join(map(str, files))
    if not counts["groups"]:
        raise UserError(f"{named}: no group has two responses with different rewards ({_left_out(counts)}); "
                        "add responses")
    if not counts["records"] and counts["passed_over"]:
        raise UserError(f"{named}: no response that is better than another one of its group ended "
                        f"({counts['unfinished']:,} of {counts['responses']:,} have {FINISH!r}: {LENGTH!r}); "
                        "write longer ones (`megatron-sov generate --max-new-tokens`), or pass "
                        "--keep-unfinished")
    if not counts["records"]:
        raise UserError(f"{named}: no group has two different responses; add responses")


def chats_of(group: ResponseGroup, tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield a chat for each response, with `NUM_PROMPT` and `COLUMNS`, and an id where the group has one."""
    # what others have said before the responses is no part of them
    prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in group.prompt]
    id_ = group.beside.get("id")
    for i, (response,
            place) in enumerate(zip(group.responses, compute_group_advantages(group.rewards), strict=True)):
        if not should_train(place, group.ended[i]):
            tally.counts["passed_over"] += 1
            tally.set_aside[NOT_ENDED] += 1
            continue
        own = {"id": f"{id_}-{i}"} if isinstance(id_, (str, int)) else {}
        yield {**group.beside, **own, "messages": [*prompt, *response],
               NUM_PROMPT_FIELD: len(prompt), COLUMNS[0]: place, COLUMNS[1]: 1 / len(group.rewards)}


def read_groups(file: Path, tally: RecordTally) -> Iterator[ResponseGroup]:
    """Yield the groups of a file, and count its responses: each as read, and those without a reward or a text
    as set aside.

    Raises:
        UserError: the file cannot be read, or a line is not as it should be; the message names it.
    """
    for where, record in _joined(_read_lines(file, tally), tally):
        yield _group(record, where)


def _read_lines(file: Path, tally: RecordTally) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in read_objects(file):
        responses = record.get("responses")
        tally.num_read += len(responses) if isinstance(responses, list) else 1
        yield where, _of_layout(record, where)


def _of_layout(record: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        refuse_media(record, is_prompt=False)
        return split_response(convert_layout(record, "preference"))
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None


def _joined(lines: Iterable[tuple[str, dict[str, Any]]], tally: RecordTally
            ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the record of each group.  Successive scored lines of one prompt, which have a response each,
    become a group; responses without a reward or a text are counted as set aside."""
    def prompt_of(line: tuple[str, dict[str, Any]]) -> str:
        where, record = line
        # Neighbours only: `score` writes in order, and files may be larger than memory.
        return json.dumps([record.get("prompt"), record.get("system")]) if is_scored(record) else where

    def is_scored(record: dict[str, Any]) -> bool:
        return "responses" not in record and get_completion_field(record) is not None

    for _, same in groupby(lines, prompt_of):
        scored = list(same)
        where, first = scored[0]
        if not is_scored(first):
            yield where, first
            continue
        responses = []
        for line, record in scored:
            content, reward = record.get(get_completion_field(record) or ""), _reward(record, line)
            is_text = isinstance(content, str) and content.strip()
            if reward is None:
                tally.set_aside["no reward"] += 1
            elif not is_text and not isinstance(content, list):
                tally.set_aside["no text"] += 1
            else:
                responses.append({"content" if is_text else "messages": content, "reward": reward,
                                  FINISH: record.get(FINISH)})
        yield where, {**{name: first[name] for name in BESIDE if name in first}, "responses": responses}


def _reward(record: dict[str, Any], where: str) -> Any:
    """Return the reward of a line with one response; without one, its label as 1 or 0.

    Raises:
        UserError: it has neither, or the label is null or no label; the message names the line.
    """
    if "reward" in record:
        return record["reward"]
    label = parse_label(record.get(LABEL))
    if label is None:
        shown = json.dumps(record[LABEL], ensure_ascii=False)[:40] if LABEL in record else "missing"
        raise UserError(f"{where}: the label ({LABEL!r} or {KTO_TAG!r}) of the response is {shown}, must be "
                        f"one of {', '.join(LABEL_WORDS)}; correct it, give a 'reward', or remove the line")
    return float(label)


def _group(record: dict[str, Any], where: str) -> ResponseGroup:
    if "prompt" not in record or not isinstance(record.get("responses"), list):
        raise UserError(f"{where}: needs a 'prompt' and a list 'responses', or a 'completion' with its "
                        "'label'; add them")
    own = {"prompt", "responses"}
    # They would be overwritten without a word.
    if taken := {"messages", NUM_PROMPT_FIELD, *COLUMNS} & record.keys():
        raise UserError(f"{where}: has {min(taken)!r}, which this step writes; remove it")
    prompt = _messages(record["prompt"], "user", f"{where}: prompt")
    responses = [_response(r, f"{where}: responses[{i}]") for i, r in enumerate(record["responses"])]
    return ResponseGroup({k: v for k, v in record.items() if k not in own}, prompt,
                         [messages for messages, _ in responses], [reward for _, reward in responses],
                         [r.get(FINISH) != LENGTH for r in record["responses"]])


def _response(value: Any, where: str) -> tuple[list[dict[str, Any]], float]:
    if not isinstance(value, dict) or ("content" in value) == ("messages" in value):
        raise UserError(f"{where} is {json.dumps(value, ensure_ascii=False)[:80]}, must be an object with "
                        "either 'content' or 'messages', and 'reward' or 'rewards'")
    if ("reward" in value) == ("rewards" in value):
        raise UserError(f"{where}: needs either a number 'reward' or an object 'rewards' of numbers")
    given = {"reward": value["reward"]} if "reward" in value else value["rewards"]
    if not isinstance(given, dict) or not given:
        raise UserError(f"{where}: 'rewards' is {str(given)[:40]!r}, must be an object of numbers")
    for name, number in given.items():
        if not is_float32(number):
            raise UserError(f"{where}: {name} is {str(number)[:40]!r}, must be a finite number that float32 "
                            "holds; a response that no judge could score does not belong into a group")
    messages = _messages(value["messages"] if "messages" in value else value["content"], "assistant", where)
    if not any(m.get("role") == "assistant" for m in messages):
        raise UserError(f"{where}: holds no message of the assistant")
    return messages, math.fsum(given.values())


def _messages(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    try:
        parse_messages(messages, "messages")
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    return list(messages)
