"""The layouts of records that people bring: one table of those that are known (`LAYOUTS`), of which a
record's fields choose; the names that a user gives to other fields (`--columns`), and a proposal of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents.messages import EMPTY, BadRecord, sharegpt_messages
from megatron_sov.base.errors import UserError

KINDS = ("text", "chat", "preference", "prompt")
COMPLETIONS = ("completion", "response")
"""Names of what is answered to a `prompt`; the first is TRL's."""
LABEL = "label"
"""Field of a judged response, true or false: whether it is a good one."""
KTO_TAG = "kto_tag"
"""LLaMA-Factory's name for it."""
LABELS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
"""Spellings of a label, in lower case."""
ALPACA = ("instruction", "input", "output", "system", "history")
"""Fields of an Alpaca record: a question in two parts, its answer, and what comes before."""
DOLLY = {"context": "input", "response": "output"}
"""Dolly's names for two of them."""
QUESTIONS = ("question", "answer")
"""Fields of GSM8K and many others."""
CHATS = ("messages", "conversations")
SIDES = ("chosen", "rejected")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields in which other tools keep pictures, sounds and videos beside a text that names them."""
FOREIGN = (*ALPACA, *DOLLY, *QUESTIONS, *MEDIA, KTO_TAG, LABEL)
"""Fields that decide how a record is read, beside those of messages."""


def parse_label(value: Any) -> bool | None:
    """Return the label that a boolean, a number or a text of `LABELS` stands for; None: it is none."""
    is_scalar = isinstance(value, (bool, int, float, str))
    return LABELS.get(str(value).strip().lower().removesuffix(".0")) if is_scalar else None


def split_response(record: dict[str, Any]) -> dict[str, Any]:
    """Return a judged chat as a prompt with its completion, the last message; others are returned as they
    are."""
    chat = _chat_name(record)
    if chat is None or "prompt" in record or LABEL not in record:
        return record
    messages = sharegpt_messages(record[chat], chat)
    return {"prompt": messages[:-1], "completion": messages[-1:], **_without(record, (chat,))}


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


def _chat_name(record: Mapping[str, Any]) -> str | None:
    return next((name for name in CHATS if isinstance(record.get(name), list) and record[name]), None)


def _without(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def completion_of(record: Mapping[str, Any]) -> str | None:
    """Return the name of the field with what is answered to a record's `prompt`; None: it has none."""
    return next((name for name in COMPLETIONS if record.get(name) is not None), None)


def is_alpaca(record: Mapping[str, Any], kind: str | None) -> bool:
    return "instruction" in record and not {"prompt", *CHATS} & record.keys() and (
        {*SIDES} <= record.keys() or bool({"input", "output", "response"} & record.keys()))


def _of_alpaca(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    if not {"input", "output"} & record.keys():
        record = {DOLLY.get(name, name): value for name, value in record.items()}
    for name in ALPACA[:3]:
        if record.get(name) is not None and not isinstance(record[name], str):
            raise BadRecord("fields", f"{name!r} is {str(record[name])[:40]!r}, must be a string")
    # instruction and input as LLaMA-Factory joins them
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
    if before and kind == "chat" and parse_label(record.get(KTO_TAG)) is None:  # its answers are learned
        return {"messages": [*prompt, {"role": "assistant", "content": record["output"]}], **others}
    return {"prompt": prompt, "completion": record["output"], **others}


def _is_questions(record: Mapping[str, Any], kind: str | None) -> bool:
    has_answer = isinstance(record.get("answer"), str) or {*SIDES} <= record.keys()
    return isinstance(record.get("question"), str) and not {"prompt", *CHATS} & record.keys() and (
        has_answer or kind == "prompt")


def _of_questions(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    prompt = {"prompt": record["question"], **_without(record, ("question",))}
    # of a prompt the answer is the reward's
    if kind == "prompt" or {*SIDES} <= record.keys():
        return prompt
    return {"completion": record["answer"], **_without(prompt, ("answer",))}


def _is_tagged(record: Mapping[str, Any], kind: str | None) -> bool:
    # a prompt keeps the tag as it is: its other fields are the reward's
    is_judged = kind == "preference" and KTO_TAG in record
    return kind != "prompt" and (is_judged or parse_label(record.get(KTO_TAG)) is not None)


def _of_tagged(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    label = parse_label(record[KTO_TAG])
    return {LABEL: record[KTO_TAG] if label is None else label, **_without(record, (KTO_TAG,))}


def _is_shared_pair(record: Mapping[str, Any], kind: str | None) -> bool:
    return (kind is not None and _chat_name(record) is not None
            and all(isinstance(record.get(side), dict) for side in SIDES))


def _of_shared_pair(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    chat = _chat_name(record) or CHATS[1]
    sides = {side: sharegpt_messages([record[side]], side) for side in SIDES}
    return {"prompt": sharegpt_messages(record[chat], chat), **sides,
            **_without(record, (chat, "prompt", *SIDES))}


@dataclass(frozen=True)
class RecordLayout:
    """One way in which records are written."""

    name: str
    """What it is called, and who writes it so."""
    fields: tuple[str, ...]
    """Fields that it is known by."""
    taken_by: str
    """What takes such records: a `--format` of `sov-data pack`, or another command."""
    applies: Callable[[Mapping[str, Any], str | None], bool] | None = None
    """Whether a record that is read as a kind has this layout; None: its fields are those that are read
    here."""
    convert: Callable[[dict[str, Any], str | None], dict[str, Any]] | None = None
    """Makes of it a record of a layout that is read here."""


LAYOUTS = (
    RecordLayout("Text", ("text",), "--format text"),
    RecordLayout("Messages (OpenAI, TRL)", ("messages",), "--format chat"),
    RecordLayout("ShareGPT", ("conversations",), "--format chat"),
    RecordLayout("Prompt and completion (TRL)", ("prompt", "completion"), "--format chat"),
    RecordLayout("Prompt and response", ("prompt", "response"), "--format chat"),
    # before the others: what follows knows prompts and messages alone
    RecordLayout("Alpaca", ("instruction", "input", "output"), "--format chat", is_alpaca, _of_alpaca),
    RecordLayout("Dolly", ("instruction", "context", "response"), "--format chat", is_alpaca, _of_alpaca),
    RecordLayout("Question and answer (GSM8K)", ("question", "answer"), "--format chat", _is_questions,
                 _of_questions),
    RecordLayout("Judged responses (KTO of TRL)", ("prompt", "completion", "label"), "sov-data unpaired"),
    RecordLayout("Judged responses (LLaMA-Factory)", ("conversations", "kto_tag"), "sov-data unpaired",
                 _is_tagged, _of_tagged),
    RecordLayout("Pairs (TRL)", ("prompt", "chosen", "rejected"), "--format preference"),
    RecordLayout("Pairs of whole chats (TRL)", ("chosen", "rejected"), "--format preference"),
    RecordLayout("Pairs of Alpaca", ("instruction", "chosen", "rejected"), "--format preference", is_alpaca,
                 _of_alpaca),
    RecordLayout("Pairs of ShareGPT", ("conversations", "chosen", "rejected"), "--format preference",
                 _is_shared_pair, _of_shared_pair),
    RecordLayout("Pairs with a question", ("question", "chosen", "rejected"), "--format preference",
                 _is_questions, _of_questions),
    RecordLayout("Prompts", ("prompt",), "--format prompt"),
)
"""All layouts that are known; those that convert do so in this order."""


def own_fields(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Return a record with the fields that are read here.

    Args:
        record: of any layout; one that is known already is returned as it is.
        kind: what it is read as, one of `KINDS`; None: by its fields.

    Raises:
        BadRecord: a field of the layout has another type than it should.
    """
    for layout in LAYOUTS:
        if layout.applies is not None and layout.convert is not None and layout.applies(record, kind):
            record = layout.convert(record, kind)
    return record


TARGETS = ("prompt", "response", "completion", "messages", "conversations", "chosen", "rejected", "system",
           "tools", "label")
"""Fields that `--columns` can name."""
Renames = tuple[tuple[str, tuple[str, ...]], ...]
"""A field that is read here -> those of the record that it is made of."""


def parse_renames(arguments: Iterable[str], targets: Collection[str] = TARGETS) -> Renames:
    """Read `TARGET=FIELD[+FIELD],...`.

    Args:
        arguments: as they were typed.
        targets: what may be named; none: anything.

    Raises:
        UserError: it is not so written, names an unknown target, or one twice.
    """
    renames: dict[str, tuple[str, ...]] = {}
    for argument in arguments:
        for part in argument.split(","):
            target, equals, fields = part.strip().partition("=")
            sources = tuple(name.strip() for name in fields.split("+"))
            where = f"--columns {argument}"
            if target == "text" and targets:
                raise UserError(f"{where}: the field of a text is named by --text-field {fields or 'NAME'}")
            if not equals or not target or not all(sources):
                raise UserError(f"{where}: {part!r} must be TARGET=FIELD, e.g. prompt=instruction")
            if targets and target not in targets:
                raise UserError(f"{where}: {target!r} is no field of records; choose from "
                                f"{', '.join(targets)}")
            if target in renames:
                raise UserError(f"{where}: {target!r} is named twice; join fields with '+', e.g. "
                                f"{target}={'+'.join((*renames[target], *sources))}")
            renames[target] = sources
    return tuple(renames.items())


def rename_fields(record: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Return a record with its fields under the names that `--columns` gives them; several that make one are
    joined by a line feed.

    Raises:
        BadRecord: it lacks a field, or one that is joined is no text.
    """
    taken = {name for _, sources in renames for name in sources}
    found = {name: value for name, value in record.items() if name not in taken}
    for target, sources in renames:
        if missing := [name for name in sources if name not in record]:
            raise BadRecord("fields", f"has no field {missing[0]!r}, which --columns names "
                                      f"(fields: {', '.join(record) or 'none'})")
        values = [record[name] for name in sources]
        if len(values) > 1:
            if odd := [name for name in sources if not isinstance(record[name], str | None)]:
                raise BadRecord("fields", f"has {str(record[odd[0]])[:40]!r} in field {odd[0]!r}, must be a "
                                          "string to be joined by --columns")
            values = ["\n".join(filter(None, values))]
        found[target] = values[0]
    return found


def unread_fields(record: dict[str, Any], kind: str, renames: Renames, read: Collection[str]) -> list[str]:
    """Return the fields of a record that hold something and are not read, in its order.

    Args:
        record: a record as it is.
        kind: what it is read as.
        renames: names that the user gives to its fields.
        read: fields that are read.

    Raises:
        BadRecord: the record is malformed.
    """
    # what a layout has taken is gone by now; the same field beside another layout says nothing
    foreign = {*ALPACA, *DOLLY, *QUESTIONS, KTO_TAG} - {"system", *COMPLETIONS}
    left = own_fields(rename_fields(record, renames), kind).keys() - ({*read} - foreign)
    return [name for name, value in record.items() if name in left and value not in EMPTY]


_MEANT = {
    "messages": ("dialog", "dialogue", "chat", "conversation", "message", "turns"),
    "chosen": ("chosen", "preferred", "better", "winner", "accepted", "positive"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "negative"),
    "prompt": ("prompt", "question", "query", "instruction", "input", "problem", "user", "human", "request",
               "ask"),
    "response": ("response", "answer", "completion", "output", "reply", "solution", "target", "assistant",
                 "gpt", "bot", "summary"),
    "text": ("text", "content", "body", "document", "article", "passage", "story", "markdown", "code"),
}
"""What is read here -> words in the names of fields that often hold it."""
_NEEDED = {"chat": ("prompt", "response"), "preference": ("chosen", "rejected", "prompt"),
           "prompt": ("prompt",), "text": ("text",)}


def propose_columns(record: Mapping[str, Any], kind: str) -> str:
    """Return the option that would let a record of an unknown layout be read, by the names of its fields."""
    found: dict[str, str] = {}
    values = {name: value for name, value in record.items() if isinstance(value, (str, list))}
    for target in ("messages", *_NEEDED[kind]) if kind == "chat" else _NEEDED[kind]:
        words = _MEANT[target]
        fits = [name for name, value in values.items() if name not in found.values()
                # of a table's columns the names alone are known
                and (target != "messages" or isinstance(value, list) or value == "")
                and {*words} & {*re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())}]
        if fits:
            found[target] = min(fits, key=lambda name: len(name))
    if "messages" in found:
        found = {"messages": found["messages"]}
    elif not found.keys() >= {*_NEEDED[kind]}:
        texts = [name for name, value in values.items() if isinstance(value, str)]
        fits_in_order = len(texts) == len(_NEEDED[kind]) and kind != "preference"
        found = dict(zip(_NEEDED[kind], texts, strict=True)) if fits_in_order else {}
    if kind == "text":
        return f"--text-field {found.get('text', 'NAME')}"
    named = found or dict.fromkeys(_NEEDED[kind], "FIELD")
    return "--columns " + ",".join(f"{target}={named[target]}" for target in sorted(
        named, key=lambda target: (target != "prompt", list(_MEANT).index(target))))
