"""`sov-data groups`: turn judged responses to a prompt into chats with advantages (GrouPER).

K-EXAONE's technical report: a response's advantage is ``2 (z - min z) / (max z - min z) - 1`` for rewards z,
each the sum of rule and rubric rewards. A group with equal rewards is left out.

A truncated response (`finish_reason`: "length" from `megatron-sov generate`) counts in its group, but
training may only learn to avoid the response: the chat would end before its writer did.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.accounting import RecordTally
from megatron_sov.base.documents.groups import are_equal, compute_group_advantages, should_train
from megatron_sov.base.documents.layouts import (
    KTO_TAG, LABEL, LABEL_WORDS, convert_layout, get_completion_field, parse_label, refuse_media,
    split_response)
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import NUM_PROMPT_FIELD, is_float32
from megatron_sov.base.errors import Fix, UserError, choose_free_path
from megatron_sov.base.settings import DeclaredCommand, Flag

FILE = "groups.jsonl"
SINGLE, EQUAL_REWARDS, TRUNCATED = "only response to its prompt", "equal rewards", "did not end"
"""Reasons for responses set aside."""
FINISH, LENGTH = "finish_reason", "length"
"""Field from `megatron-sov generate`, and the value for truncated responses."""
PROMPT_FIELDS = ("prompt", "system", "id", "tools", "chat_template_kwargs")
"""Prompt fields in a scored row."""
COLUMNS = ("advantage", "group_share")
"""Chat fields: the advantage, and 1 / responses in the group. With `NUM_PROMPT_FIELD`, groups of a prompt are
held out together."""


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Turn groups of judged responses into chats with advantages, for `sov-data pack --format chat
    --column advantage --column group_share`."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """JSON lines with groups, {"prompt": ..., "responses": [{"content": ..., "reward": 1.0}, ...]}, in
    which prompts and responses may be message lists; or with a response per line, from `megatron-sov score`
    or as TRL's completion with a label: successive rows with the same prompt are a group. Takes several
    files, and may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the corpus."""
    keep_unfinished: bool = False
    """Learn truncated responses ("finish_reason": "length") as good examples too, with an added end."""
    overwrite: bool = False
    """Replace an existing corpus."""


@dataclass
class GroupTally(RecordTally):
    """Counts of responses and groups."""

    counts: Counter[str] = field(default_factory=Counter)
    """"groups" and "responses" used; groups "alone" and with "equal_rewards"; ..."""


@dataclass(frozen=True)
class ResponseGroup:
    """Judged responses to a prompt."""

    fields: dict[str, Any]
    """Further record fields, e.g. `tools`."""
    prompt: list[dict[str, Any]]
    """Messages."""
    responses: list[list[dict[str, Any]]]
    """Messages per response."""
    rewards: list[float]
    ended: list[bool]
    """False for truncated responses."""

    def number_id(self, number: int) -> dict[str, Any]:
        """Return the `id` field for record `number`: "ID-NUMBER"; {} if the group has no id."""
        id_ = self.fields.get("id")
        return {"id": f"{id_}-{number}"} if isinstance(id_, (str, int)) else {}


def write_groups(options: GroupOptions, file: str,
                 build_records: Callable[[ResponseGroup, GroupTally], Iterable[Any]],
                 record_responses: int) -> None:
    """Write an artifact of kind "corpus". Raises `UserError`, without output, for a malformed record, or if
    no group gives a record.

    `build_records` converts a group with different rewards to records of `record_responses` responses each.
    It counts responses set aside, and as "passed_over" truncated responses that would be learned as good
    examples."""
    check_output_folder(options.output, CORPUS, options.overwrite)
    tally = GroupTally()
    counts = tally.counts
    with create_artifact(options.output, CORPUS, overwrite=options.overwrite) as artifact:
        with open(artifact.path / file, "w", encoding="utf-8") as out:
            for group in iter_groups(options.input, tally):
                num_responses = len(group.rewards)
                if num_responses < 2:
                    counts["alone"] += 1
                    tally.set_aside[SINGLE] += num_responses
                    continue
                if are_equal(group.rewards):  # advantages divide by the spread of rewards
                    counts["equal_rewards"] += 1
                    tally.set_aside[EQUAL_REWARDS] += num_responses
                    continue
                counts["groups"] += 1
                counts["responses"] += num_responses
                counts["unfinished"] += group.ended.count(False)
                if options.keep_unfinished:
                    group = replace(group, ended=[True] * num_responses)
                for record in build_records(group, tally):
                    counts["records"] += 1
                    tally.num_written += record_responses
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        _check_counts(options.input, counts)
        account = tally.account("responses")
        artifact.content = {"groups": {f"num_{name}": counts[name] for name in (
            "groups", "responses", "equal_rewards", "alone", "unfinished", "passed_over")},
            "account": account.to_dict()}
    print(f"{counts['groups']:,} groups of {counts['responses'] / counts['groups']:.1f} responses, of which "
          f"{counts['unfinished']:,} did not end")
    print(account.describe())


def _check_counts(files: Sequence[Path], counts: Counter[str]) -> None:
    names = ", ".join(map(str, files))
    if not counts["groups"]:
        raise UserError(f"{names}: no group has two responses with different rewards "
                        f"({counts['equal_rewards']:,} with equal rewards and {counts['alone']:,} of one "
                        "response); add responses")
    if not counts["records"] and counts["passed_over"]:
        raise UserError(f"{names}: no response that is better than another one of its group ended "
                        f"({counts['unfinished']:,} of {counts['responses']:,} have {FINISH!r}: {LENGTH!r}); "
                        "write longer ones (`megatron-sov generate --max-new-tokens`), or pass "
                        "--keep-unfinished")
    if not counts["records"]:
        raise UserError(f"{names}: no group has two different responses; add responses")


def build_chats(group: ResponseGroup, tally: GroupTally) -> Iterator[dict[str, Any]]:
    """Yield a chat per response with `NUM_PROMPT_FIELD` and `COLUMNS`."""
    # earlier assistant turns in the prompt are not learned
    prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in group.prompt]
    advantages = compute_group_advantages(group.rewards)
    for i, (response, advantage) in enumerate(zip(group.responses, advantages, strict=True)):
        if not should_train(advantage, group.ended[i]):
            tally.counts["passed_over"] += 1
            tally.set_aside[TRUNCATED] += 1
            continue
        yield {**group.fields, **group.number_id(i), "messages": [*prompt, *response],
               NUM_PROMPT_FIELD: len(prompt), COLUMNS[0]: advantage, COLUMNS[1]: 1 / len(group.rewards)}


GROUPS = DeclaredCommand(GroupOptions, lambda options: write_groups(options, FILE, build_chats, 1))


def iter_groups(files: Sequence[Path], tally: RecordTally) -> Iterator[ResponseGroup]:
    """Yield groups; count responses read, and set aside responses without reward or text. Raises `UserError`:
    an unreadable file or a malformed line."""
    for file in files:
        for where, record in _join_scored_lines(_iter_lines(file, tally), tally):
            yield _parse_group(record, where)


def _iter_lines(file: Path, tally: RecordTally) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in read_records(file):
        responses = record.get("responses")
        tally.num_read += len(responses) if isinstance(responses, list) else 1
        try:
            refuse_media(record, is_prompt=False)
            yield where, split_response(convert_layout(record, "preference"))
        except BadRecord as e:
            raise UserError(f"{where}: {e.reason}") from None


def _is_scored(record: dict[str, Any]) -> bool:
    """Return whether a record holds a single response."""
    return "responses" not in record and get_completion_field(record) is not None


def _join_scored_lines(lines: Iterable[tuple[str, dict[str, Any]]], tally: RecordTally
                       ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Join successive scored lines of a prompt to a record with `responses`; yield further records as is."""
    def get_group_key(line: tuple[str, dict[str, Any]]) -> str:
        where, record = line
        # neighbours only: `score` writes in order, and files may exceed memory
        return json.dumps([record.get("prompt"), record.get("system")]) if _is_scored(record) else where

    for _, group in groupby(lines, get_group_key):
        group_lines = list(group)
        where, first = group_lines[0]
        if not _is_scored(first):
            yield where, first
            continue
        responses = []
        for line, record in group_lines:
            content, reward = record.get(get_completion_field(record) or ""), _read_reward(record, line)
            is_text = isinstance(content, str) and content.strip()
            if reward is None:
                tally.set_aside["no reward"] += 1
            elif not is_text and not isinstance(content, list):
                tally.set_aside["no text"] += 1
            else:
                responses.append({"content" if is_text else "messages": content, "reward": reward,
                                  FINISH: record.get(FINISH)})
        yield where, {**{name: first[name] for name in PROMPT_FIELDS if name in first},
                      "responses": responses}


def _read_reward(record: dict[str, Any], where: str) -> Any:
    """Return a scored line's reward, or the label as 1 or 0. Raises `UserError`: a missing or bad label."""
    if "reward" in record:
        return record["reward"]
    label = parse_label(record.get(LABEL))
    if label is None:
        label_text = json.dumps(record[LABEL], ensure_ascii=False)[:40] if LABEL in record else "missing"
        file = Path(where.rpartition(":")[0])
        scored = choose_free_path(f"{file.with_suffix('')}-scored.jsonl")
        words = ["megatron-sov", "score", "--reward", "math", "--input", str(file), "--output", scored]
        fix = Fix(words={str(file): scored}, before=(shlex.join(words),)) if LABEL not in record else None
        raise UserError(f"{where}: the label ({LABEL!r} or {KTO_TAG!r}) of the response is {label_text}, "
                        f"must be one of {', '.join(LABEL_WORDS)}; correct it, give a 'reward' "
                        "(`megatron-sov score`), or remove the line", fix)
    return float(label)


def _parse_group(record: dict[str, Any], where: str) -> ResponseGroup:
    if "prompt" not in record or not isinstance(record.get("responses"), list):
        if {"chosen", "rejected"} <= record.keys():
            file = shlex.quote(where.rpartition(":")[0])
            raise UserError(f"{where}: is a pair already; `megatron-sov prefer` learns from it",
                            Fix(f"megatron-sov prefer --from MODEL --data {file} --run new-run"))
        raise UserError(f"{where}: needs a 'prompt' and a list 'responses', or a 'completion' with its "
                        "'label'; responses are written by `megatron-sov generate --samples 4 "
                        "--temperature 1`, rewards by `megatron-sov score`")
    # the output would silently overwrite these fields
    if reserved := {"messages", NUM_PROMPT_FIELD, *COLUMNS} & record.keys():
        raise UserError(f"{where}: has {min(reserved)!r}, which this step writes; remove it")
    prompt = _parse_messages(record["prompt"], "user", f"{where}: prompt")
    responses = [_parse_response(r, f"{where}: responses[{i}]") for i, r in enumerate(record["responses"])]
    fields = {name: value for name, value in record.items() if name not in ("prompt", "responses")}
    return ResponseGroup(fields, prompt, [messages for messages, _ in responses],
                         [reward for _, reward in responses],
                         [r.get(FINISH) != LENGTH for r in record["responses"]])


def _parse_response(value: Any, where: str) -> tuple[list[dict[str, Any]], float]:
    """Return messages, and the reward or the sum of rewards."""
    if not isinstance(value, dict) or ("content" in value) == ("messages" in value):
        raise UserError(f"{where} is {json.dumps(value, ensure_ascii=False)[:80]}, must be an object with "
                        "either 'content' or 'messages', and 'reward' or 'rewards'")
    if ("reward" in value) == ("rewards" in value):
        raise UserError(f"{where}: needs either a number 'reward' or an object 'rewards' of numbers")
    rewards = {"reward": value["reward"]} if "reward" in value else value["rewards"]
    if not isinstance(rewards, dict) or not rewards:
        raise UserError(f"{where}: 'rewards' is {str(rewards)[:40]!r}, must be an object of numbers")
    for name, number in rewards.items():
        if not is_float32(number):
            raise UserError(f"{where}: {name} is {str(number)[:40]!r}, must be a finite number that float32 "
                            "holds; a response that no judge could score does not belong into a group")
    messages = _parse_messages(value["messages"] if "messages" in value else value["content"], "assistant",
                               where)
    if not any(m.get("role") == "assistant" for m in messages):
        raise UserError(f"{where}: holds no message of the assistant")
    return messages, math.fsum(rewards.values())


def _parse_messages(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    try:
        parse_messages(messages, "messages")
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    return list(messages)
