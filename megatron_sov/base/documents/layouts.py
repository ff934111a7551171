"""Layouts of other tools' records, as the fields that are read here: LLaMA-Factory's Alpaca and ShareGPT, a
column of system prompts, and what no field here can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sov.base.documents.messages import BadRecord, sharegpt_messages

LABEL = "label"
"""Field of a judged response, true or false: whether it is a good one."""
KTO_TAG = "kto_tag"
"""LLaMA-Factory's name for it."""
ALPACA = ("instruction", "input", "output", "system", "history")
"""Fields of an Alpaca record: a question in two parts, its answer, and what comes before."""
CHATS = ("messages", "conversations")
SIDES = ("chosen", "rejected")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields in which other tools keep pictures, sounds and videos beside a text that names them."""
FOREIGN = (*ALPACA, *MEDIA, KTO_TAG, LABEL)
"""Fields that decide how a record is read, beside those of messages."""


def own_fields(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Return a record with the fields that are read here.

    Args:
        record: of any layout; one that is known already is returned as it is.
        kind: what it is read as, one of `KINDS`; None: by its fields.

    Raises:
        BadRecord: a field of the layout has another type than it should.
    """
    if is_alpaca(record):
        record = _of_alpaca(record, kind)
    if isinstance(record.get(KTO_TAG), bool) and kind != "prompt":
        record = {LABEL: record[KTO_TAG], **_without(record, (KTO_TAG,))}
    chat = _chat_name(record)
    if kind is not None and chat is not None and all(isinstance(record.get(side), dict) for side in SIDES):
        sides = {side: sharegpt_messages([record[side]], side) for side in SIDES}
        record = {"prompt": sharegpt_messages(record[chat], chat), **sides,
                  **_without(record, (chat, "prompt", *SIDES))}
    return record


def split_response(record: dict[str, Any]) -> dict[str, Any]:
    """Return a judged chat as a prompt with its completion, the last message; others are returned as they
    are."""
    chat = _chat_name(record)
    if chat is None or "prompt" in record or LABEL not in record:
        return record
    messages = sharegpt_messages(record[chat], chat)
    return {"prompt": messages[:-1], "completion": messages[-1:], **_without(record, (chat,))}


def is_alpaca(record: Mapping[str, Any]) -> bool:
    """Return whether a record, or a table with such columns, is one of Alpaca's."""
    return "instruction" in record and not {"prompt", *CHATS} & record.keys() and (
        "output" in record or {*SIDES} <= record.keys() or "input" in record)


def refuse_media(record: Mapping[str, Any], is_prompt: bool) -> None:
    """Refuse pictures, sounds and videos beside a text: they would be left out without a word.

    Raises:
        BadRecord: there are such.
    """
    for name in MEDIA:
        value = record.get(name)
        # a prompt's other fields are the reward's: a name alone may well be that of a container
        if value and isinstance(value, (list, dict, bytes) if is_prompt else (list, dict, bytes, str)):
            raise BadRecord("media", f"has {name!r}, and what is packed here is text; turn such records into "
                                     "tokens with `sov-data encode-media` first, or remove the field")


def _of_alpaca(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    for name in ALPACA[:3]:
        if record.get(name) is not None and not isinstance(record[name], str):
            raise BadRecord("fields", f"{name!r} is {str(record[name])[:40]!r}, must be a string")
    asked = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    before: list[dict[str, Any]] = []
    for i, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRecord("fields", f"history[{i}] is {str(pair)[:40]!r}, must be a question and its "
                                      "answer")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = [*before, {"role": "user", "content": asked}]
    if record.get("output") is None or kind == "prompt":  # whose other fields are the reward's
        return {"prompt": prompt, **_without(record, ("instruction", "input", "history"))}
    others = _without(record, ("instruction", "input", "output", "history"))
    if before and kind == "chat" and not isinstance(record.get(KTO_TAG), bool):  # its answers are learned
        return {"messages": [*prompt, {"role": "assistant", "content": record["output"]}], **others}
    return {"prompt": prompt, "completion": record["output"], **others}


def _chat_name(record: Mapping[str, Any]) -> str | None:
    return next((name for name in CHATS if isinstance(record.get(name), list) and record[name]), None)


def _without(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}
