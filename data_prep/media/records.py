"""Parse records that name media, and format records for `sov-data pack`: text with media tokens, banks."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data_prep.media.encode_media import CALL
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.messages import check_depth
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO, find_media_token
from megatron_sov.omni.media.banks import BANK_KINDS
from megatron_sov.omni.media.items import MediaItem, build_drawing_call

CHAT, TEXT = "chat", "text"
"""Record kinds, as in `sov-data pack --format`."""
KINDS = (IMAGE, AUDIO, VIDEO)


@dataclass(frozen=True)
class MessagePart:
    """A part of a message or document."""

    kind: str
    """"text", or a kind in `KINDS`."""
    value: str
    """Text or path."""


@dataclass(frozen=True)
class MediaMessage:
    """A message, or a document's content."""

    fields: dict[str, Any]
    """Further fields, e.g. `role`; {} for a document."""
    parts: tuple[MessagePart, ...] | None
    """None: the message has no content."""

    @property
    def is_drawn(self) -> bool:
        """Whether the model generates the message's media."""
        return self.fields.get("role") == "assistant"


@dataclass(frozen=True)
class MediaRecord:
    """An input record."""

    kind: str
    """`CHAT` or `TEXT`."""
    fields: dict[str, Any]
    messages: tuple[MediaMessage, ...]
    """A document has a single message."""

    def iter_media(self) -> Iterator[MessagePart]:
        for message in self.messages:
            yield from (part for part in message.parts or () if part.kind in KINDS)


@dataclass(frozen=True)
class Medium:
    """An encoded medium, except its name."""

    mime_type: str
    discrete: str = ""
    """Text of codebook tokens."""
    duration_s: float = 0.0
    """Length of a sound or video."""
    bank: str = ""
    """Bank kind; "": no records."""
    rows: tuple[tuple[int, int], ...] = ()
    """(bank row, used slots) per record."""


def parse_record(line: bytes) -> MediaRecord:
    """Parse a line. Raises `BadRecord`: no chat or document, a malformed part, or a media token in text."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({e}); every line must be one JSON object") from None
    check_depth(record)
    if not isinstance(record, dict) or ("messages" in record) == ("content" in record):
        raise BadRecord("fields", "must be an object with either 'messages' (a chat) or 'content' (a "
                                  "document)")
    if FEATURES in record:
        raise BadRecord("fields", f"has a field {FEATURES!r}, which this step writes; remove it")
    if "content" in record:
        kind, own = TEXT, "content"
        messages = [MediaMessage({}, _parse_parts(record["content"], "content"))]
    else:
        kind, own = CHAT, "messages"
        messages = _parse_messages(record["messages"])
    fields = {name: value for name, value in record.items() if name != own}
    if kind == TEXT and "text" in fields:
        raise BadRecord("fields", "has both 'content' and 'text'; leave one out")
    # a template may write a further field into the text, so check every field
    texts = [part.value for message in messages for part in message.parts or () if part.kind == "text"]
    checked = [fields, *(message.fields for message in messages), *texts]
    if token := find_media_token(json.dumps(checked, ensure_ascii=False)):
        raise BadRecord("mark", f"spells {token!r}, which is a token of media; remove it: media are named by "
                                "their paths alone")
    return MediaRecord(kind, fields, tuple(messages))


def _parse_messages(value: Any) -> list[MediaMessage]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRecord("fields", "'messages' must be a non-empty list of objects with 'role' and 'content'")
    messages = []
    for i, message in enumerate(value):
        fields = {name: part for name, part in message.items() if name != "content"}
        content = message.get("content")
        parts = None if content is None else _parse_parts(content, f"messages[{i}].content")
        messages.append(MediaMessage(fields, parts))
    return messages


def _parse_parts(content: Any, where: str) -> tuple[MessagePart, ...]:
    if isinstance(content, str):
        return (MessagePart("text", content),)
    if not isinstance(content, list) or not content:
        raise BadRecord("fields", f"{where} is {str(content)[:80]!r}, must be a string or a list of parts")
    return tuple(_parse_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _parse_part(part: Any, where: str) -> MessagePart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return MessagePart("text", part["text"])
    if kind not in KINDS or not isinstance(part.get("path"), str):
        raise BadRecord("fields", f"{where} is {str(part)[:80]!r}, must be "
                                  '{"type": "text", "text": ...} or {"type": "image", "path": ...}, '
                                  '"audio" or "video"')
    return MessagePart(kind, part["path"])


def format_record(record: MediaRecord, media: Mapping[MessagePart, Medium], drawn: str = CALL
                  ) -> dict[str, Any]:
    """Return a record for `sov-data pack`; `drawn` is `MediaSettings.drawn`. Raises `BadRecord`: an
    assistant's medium has no discrete tokens."""
    formatter = _RecordFormatter(media, drawn)
    if record.kind == TEXT:
        content: dict[str, Any] = {"text": formatter.join_parts(record.messages[0].parts or ())}
    else:
        content = {"messages": [formatter.format_message(message) for message in record.messages]}
    rows = {kind: formatter.rows[kind] for kind in BANK_KINDS if kind in formatter.rows}
    return {**record.fields, **content, FEATURES: rows}


class _RecordFormatter:
    """Replaces a record's media by text."""

    def __init__(self, media: Mapping[MessagePart, Medium], drawn: str) -> None:
        self._media, self._draws_by_call, self._numbers = media, drawn == CALL, Counter[str]()
        self.rows: dict[str, list[list[int]]] = {}
        """Bank kind -> [row, used slots] per record, in the order of placeholders in the text."""

    def format_message(self, message: MediaMessage) -> dict[str, Any]:
        if message.parts is None:
            return message.fields
        if not message.is_drawn:
            return {**message.fields, "content": self.join_parts(message.parts)}
        return self._format_drawn(message)

    def join_parts(self, parts: tuple[MessagePart, ...]) -> str:
        """Join texts and items by line feeds, as the published template does."""
        return "\n".join(part.value if part.kind == "text" else self._format_item(part) for part in parts)

    def _format_item(self, part: MessagePart) -> str:
        medium = self._media[part]
        if medium.bank:
            self.rows.setdefault(medium.bank, []).extend(map(list, medium.rows))
        number = self._numbers[part.kind]
        self._numbers[part.kind] += 1
        name = PurePosixPath(part.value).name
        return MediaItem(part.kind, number, medium.mime_type, name, medium.duration_s, medium.discrete,
                         sum(used for _, used in medium.rows)).format_text()

    def _format_drawn(self, message: MediaMessage) -> dict[str, Any]:
        """Format an assistant's message: sounds as discrete tokens, pictures as tool calls or in the text."""
        texts, calls = [], list(message.fields.get("tool_calls") or [])
        for part in message.parts or ():
            if part.kind == "text":
                texts.append(part.value)
                continue
            block = self._media[part].discrete
            if part.kind == VIDEO or not block:
                option = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}.get(part.kind)
                reason = f"which needs {option}" if option else "and a model draws no videos; remove it"
                raise BadRecord("answer", f"has a {part.kind} ({part.value}) in what the assistant says, "
                                          f"{reason}")
            if part.kind == IMAGE and self._draws_by_call:
                calls.append(build_drawing_call(block))
            else:
                texts.append(block)
        formatted = {**message.fields, "content": "\n".join(texts)}
        if calls:
            formatted["tool_calls"] = calls
        return formatted
