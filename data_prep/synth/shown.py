"""Samples for a reader: a few that were kept, and a few for each reason to reject, drawn by a hash of their
ids."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from data_prep.synth.candidates import Candidate
from data_prep.synth.sample import Verdict
from megatron_sov.documents.messages import BadRecord, Message
from megatron_sov.documents.records import Reading, parse_record

MOST_KEPT, MOST_REJECTED, MOST_REASONS = 8, 3, 40
MOST_TURNS, MOST_CHARS = 40, 4000
MODEL = "model"
"""How a page calls who speaks, where it is a model."""


class Shown:
    """Takes all samples and keeps a few."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, str, Candidate, Verdict | None]]] = {}

    def take(self, sample: Candidate, failed: Verdict | None) -> None:
        """Take a sample, and why it does not stay."""
        reason = failed.check if failed else ""
        if reason not in self._of and len(self._of) >= MOST_REASONS:
            return
        drawn = int.from_bytes(blake2b(sample.id.encode(), digest_size=8).digest(), "big")
        heap, most = self._of.setdefault(reason, []), MOST_REJECTED if failed else MOST_KEPT
        if len(heap) < most:
            heapq.heappush(heap, (-drawn, sample.id, sample, failed))
        elif -heap[0][0] > drawn:
            heapq.heapreplace(heap, (-drawn, sample.id, sample, failed))

    def to_list(self) -> list[dict[str, Any]]:
        """Return them as plain values, kept ones first."""
        found = []
        for reason in sorted(self._of):
            for _, id_, sample, failed in sorted(self._of[reason], key=lambda one: -one[0]):
                found.append({"sample": id_, "reason": reason,
                              "detail": _cut(failed.detail) if failed else "",
                              "turns": [[_cut(who), _cut(said)]
                                        for who, said in turns_of(sample)[:MOST_TURNS]],
                              "verdicts": [[one.check, one.passed, _cut(one.detail)]
                                           for one in sample.verdicts], "notes": _small(sample.notes)})
        return found


def turns_of(sample: Candidate) -> list[tuple[str, str]]:
    """Return who says what in a sample."""
    if sample.kind == "task":
        return [("task", _json(sample.record))]
    try:
        document = parse_record(dict(sample.record), "", 0, Reading(sample.kind))
    except BadRecord:
        return [("record", _json(sample.record))]
    if sample.kind == "text":
        return [(MODEL, document.text)]
    turns = [turn for message in document.messages for turn in _turns(message)]
    beside = {name: value for name, value in sample.record.items() if name not in ("messages", "prompt")}
    return [*turns, *([("beside it", _json(beside))] if beside else [])]


def _turns(message: Message) -> Iterator[tuple[str, str]]:
    who = MODEL if message.role == "assistant" else message.role
    if message.reasoning:
        yield f"{MODEL}, thinking", message.reasoning
    if message.content or not message.tool_calls:
        name = dict(message.other).get("name", "")
        yield f"tool {name}".strip() if who == "tool" else who, message.content
    for call in message.tool_calls:
        function = call["function"]
        yield f"{MODEL} calls {function['name']}", _json(function["arguments"])


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    """Return a text that a page and UTF-8 can hold."""
    sound = text.encode("utf-8", "replace").decode()
    return sound if len(sound) <= MOST_CHARS else f"{sound[:MOST_CHARS]}… ({len(sound):,} characters)"


def _small(notes: Mapping[str, Any]) -> dict[str, Any]:
    text = _cut(_json(notes))
    return json.loads(text) if text.endswith("}") else {}
