"""Rows for rewards, made of a task's data and a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sov.chat.marks import plain_form
from megatron_sov.eval.suites.items import Item, Response
from megatron_sov.eval.suites.livecodebench import code_row
from megatron_sov.eval.suites.protocol import BOXED, Protocol
from megatron_sov.rewards import patterns
from megatron_sov.rewards.answers import last_boxed
from megatron_sov.rewards.reward import Refused, Row

TURN = "turn"
"""Field of a conversation's item with the number of its question, from 0."""
THINKING_BEGIN, THINKING_END = "<think>", "</think>"


def without_thoughts(text: str, mode: str) -> str:
    """Return what a model says behind its thoughts; nothing where they do not end."""
    text = plain_form(text)
    _, mark, said = text.rpartition(THINKING_END)
    if mark:
        return said.strip()
    return "" if mode == "thinking" or text.lstrip().startswith(THINKING_BEGIN) else text


def extracted(pattern: str, text: str) -> str | None:
    """Return the first group of a pattern's last match; None: there is no match.

    With `BOXED` for a pattern it is the last box, and a text without one as it is: math-verify, which the
    reward `math` asks, reads the boxes 20 and 204 of one response as 20204.

    Raises:
        TimeoutError: the pattern takes too long over this text.
    """
    if pattern == BOXED:
        box = last_boxed(text)
        return text if box is None else f"\\boxed{{{box}}}"
    found = patterns.findall(pattern, text)
    if not found:
        return None
    return next((group for group in found[-1] if group), "") if isinstance(found[-1], tuple) else found[-1]


def row_of(protocol: Protocol, item: Item, response: Response) -> Row | None:
    """Return the row that a reward judges; None: the response has no final answer, so it is wrong.

    Raises:
        Refused: the item's data do not hold what the reward needs.
        TimeoutError: the pattern takes too long over this response.
    """
    # an episode's answer is told apart from thoughts where it is read
    said = response.text if protocol.environment else without_thoughts(response.text, protocol.mode)
    if protocol.extract:
        answer = extracted(protocol.extract, said)
        if answer is None:
            return None
        said = answer
    made: dict[str, Any] = {"prompt": item.prompt}
    for name, source in protocol.row.items():
        if source not in item.doc:
            raise Refused(f"the data have no {source!r}")
        value = item.doc[source]
        made[name] = value
    if protocol.row_maker:
        made |= ROW_MAKERS[protocol.row_maker](item.doc)
    return {**made, "response": said}


def _instructions(doc: Mapping[str, Any]) -> dict[str, Any]:
    """IFEval's and IFBench's columns; a table has every argument of any instruction, empty for most."""
    return {name: json.loads(value) if isinstance(value := doc[name], str) else value
            for name in ("instruction_id_list", "kwargs") if name in doc}


def _turn(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The known answer to this question of a conversation, where there is one."""
    known = doc.get("reference") or []
    return {"answer": known[doc[TURN]]} if doc[TURN] < len(known) else {}


ROW_MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "instructions": _instructions, "livecodebench": code_row, "turn": _turn}
"""Name -> what makes fields of a row from an item's data."""
