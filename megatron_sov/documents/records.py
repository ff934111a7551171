"""One record of a user's file as a document: text, a chat, a preference (two answers to one
prompt), or a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("text", "chat", "preference", "prompt")
Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """What records are expected to hold."""

    kind: str | None = None
    """One of `KINDS`; None: text or a chat, by the record's fields."""
    text_field: str = "text"
    """Field, or column, that holds the text."""
    max_document_bytes: int = 64 << 20
    """A longer line, row or value is a bad record: it is passed over without being held in memory."""


@dataclass(frozen=True)
class Document:
    """One document."""

    where: str
    """Its place for messages: the file, and the line of a JSONL file or the row of a Parquet file."""
    text: str = ""
    """Plain text."""
    messages: Messages = ()
    """A chat, or the prompt of a preference, as (role, content) pairs."""
    chosen: Messages = ()
    """The better continuation of a preference."""
    rejected: Messages = ()
    """The worse one."""
    awaits_response: bool = False
    """Whether it is a prompt, for which responses will be generated."""
    id: str | None = None
    """The record's own `id`."""
    extra: str = ""
    """JSON of a prompt's other fields (what a reward needs, such as an answer)."""
    line: int = 0
    """Line or row, from 1, counted from where reading began; 0 where there is none."""

    @property
    def kind(self) -> str:
        """Return which of `KINDS` it is."""
        if self.chosen:
            return "preference"
        return "prompt" if self.awaits_response else "chat" if self.messages else "text"

    def texts(self) -> tuple[str, ...]:
        """Return the pieces of text that users wrote: the text itself, or each message's content."""
        if not self.messages and not self.chosen:
            return (self.text,)
        return tuple(content for _, content in (*self.messages, *self.chosen, *self.rejected))


@dataclass(frozen=True)
class LeftOut:
    """What a data step returns for a document that is not to be packed."""

    reason: str
    """A few words to count by: documents of the same reason are one figure in the manifest."""


class BadRecord(Exception):
    """A record that cannot become a document; the reader goes on behind it."""

    def __init__(self, code: str, reason: str, line: int = 0, content: bytes = b"") -> None:
        """`code`: a word to count by; `reason`: completes a sentence that begins with the place;
        `line`: as in `Document`."""
        super().__init__(reason)
        self.code, self.reason, self.line, self.content = code, reason, line, content


def decode(raw: bytes, start_bytes: int = 0) -> str:
    """Return UTF-8 bytes as text; `start_bytes`: their place in the file, for the message.

    Raises:
        BadRecord: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 (byte {raw[e.start]:#04x} at offset {start_bytes + e.start}); "
                                "convert it, e.g. iconv -f CP949 -t UTF-8") from None


def parse_line(line: bytes, where: str, number: int, reading: Reading) -> Document:
    """Return the document of one JSONL line.

    Raises:
        BadRecord: it is no JSON object of the expected kind.
    """
    try:
        record = json.loads(decode(line))
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({e}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise BadRecord("json",
                        f"is a JSON {type(record).__name__}, must be an object with 'text' or 'messages'")
    return parse_record(record, where, number, reading)


def parse_record(record: dict[str, Any], where: str, number: int, reading: Reading) -> Document:
    """Return the document of one record.

    Raises:
        BadRecord: fields are missing or malformed, a value is too long, or nothing is in it.
    """
    kind = _kind(record, reading)
    fields: dict[str, Any] = {}
    if kind == "text":
        fields["text"] = record[reading.text_field]
    elif kind == "chat":
        fields["messages"] = _messages(record["messages"], "messages")
    elif kind == "preference":
        fields = _preference(record)
    else:
        fields["messages"] = _conversation(record["prompt"], "prompt", "user")
        fields["extra"] = json.dumps({k: v for k, v in record.items() if k != "prompt"}, ensure_ascii=False,
                                     default=str)
        fields["awaits_response"] = True
    id_ = record.get("id")
    document = Document(where, id=str(id_) if isinstance(id_, (str, int)) else None, line=number, **fields)
    check_texts(document.texts(), reading)
    return document


def _kind(record: dict[str, Any], reading: Reading) -> str:
    """Return the kind to read a record as; with an expected kind, a record of another one is
    refused by its name."""
    present = {"chat": "messages" in record, "text": isinstance(record.get(reading.text_field), str),
               "preference": "chosen" in record and "rejected" in record,
               "prompt": "prompt" in record and "chosen" not in record}
    if reading.kind is None:
        if present["chat"] or present["text"]:
            return "chat" if present["chat"] else "text"
    elif present[reading.kind]:
        return reading.kind
    elif found := next((k for k in KINDS if present[k]), None):
        article = {"text": "plain text", "chat": "a chat", "preference": "a preference",
                   "prompt": "a prompt"}[found]
        raise BadRecord("fields", f"is {article}, but --format is {reading.kind}; "
                                  f"pack it on its own with --format {found}")
    wanted = ({"text": f"string field {reading.text_field!r}", "chat": "'messages'",
               "preference": "'chosen' and 'rejected'", "prompt": "'prompt'"}[reading.kind or "text"]
              + (" and no 'messages'" if reading.kind is None else ""))
    raise BadRecord("fields", f"has no {wanted} (fields: {', '.join(record) or 'none'}); add one"
                    + (", or name the field with --text-field" if reading.kind == "text" else ""))


def _messages(messages: Any, field: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("fields", f"'{field}' must be a non-empty list of objects with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise BadRecord("fields", f"{field}[{i}] has role {role!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadRecord("fields", f"{field}[{i}].content is {message.get('content')!r}, must be a string")
    return tuple((m["role"], m["content"]) for m in messages)


def _conversation(value: Any, field: str, role: str) -> Messages:
    """Return messages given as such, or as one string by `role`."""
    return ((role, value),) if isinstance(value, str) else _messages(value, field)


def _preference(record: dict[str, Any]) -> dict[str, Messages]:
    """Return prompt, chosen and rejected; without a `prompt`, what both continuations begin
    with is the prompt."""
    chosen, rejected = (_conversation(record[field], field, "assistant") for field in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = _conversation(record["prompt"], "prompt", "user")
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadRecord("fields", "has no prompt: give 'prompt', or begin 'chosen' and 'rejected' with "
                                  "the same messages")
    if chosen == rejected:
        raise BadRecord("fields",
                        "has the same text as 'chosen' and as 'rejected'; there is nothing to prefer")
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(role == "assistant" for role, _ in messages):
            raise BadRecord("fields", f"'{field}' holds no message of the assistant behind the prompt")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected}


def check_texts(texts: tuple[str, ...], reading: Reading) -> None:
    """Raise `BadRecord` where a document's texts are too long, no text, or none at all."""
    size_bytes = 0
    for text in texts:
        try:
            size_bytes += len(text.encode())
        except UnicodeEncodeError:
            raise BadRecord("utf8", "holds half of a surrogate pair (an escape such as \\ud800), "
                                    "which is no character; remove it") from None
    if size_bytes > reading.max_document_bytes:
        raise too_long(reading)
    if not any(text.strip() for text in texts):
        raise BadRecord("empty", "holds no text")


def too_long(reading: Reading) -> BadRecord:
    """Return the refusal of a document above the limit."""
    return BadRecord("too_long", f"is longer than --max-document-bytes {reading.max_document_bytes}; "
                                 "cut it, or raise the limit")
