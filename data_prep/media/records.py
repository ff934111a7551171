"""Records that name media: chats and documents whose contents are lists of parts.

A part is ``{"type": "text", "text": ...}`` or ``{"type": "image" | "audio" | "video", "path": ...}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sov.documents import BadRecord
from megatron_sov.documents.messages import refuse_deep
from megatron_sov.media.banks import MEDIA
from megatron_sov.media.marks import spelled
from megatron_sov.media.vocabulary import AUDIO, IMAGE, VIDEO

CHAT, TEXT = "chat", "text"
"""Kinds of records, as `sov-data pack --format` names them."""
KINDS = (IMAGE, AUDIO, VIDEO)


@dataclass(frozen=True)
class Part:
    """A piece of a content."""

    kind: str
    """"text", or one of `KINDS`."""
    value: str
    """The text, or the path."""
    frames_per_s: float = 1.0
    """Of a video that is a folder of pictures."""


@dataclass(frozen=True)
class Message:
    """Parts that somebody says."""

    fields: dict[str, Any]
    """The message's other fields, its role among them; {} of a document."""
    parts: tuple[Part, ...] | None
    """What it says; None: it has no content."""

    @property
    def is_drawn(self) -> bool:
        """Whether its media are what a model draws and says, and not what it is shown."""
        return self.fields.get("role") == "assistant"


@dataclass(frozen=True)
class MediaRecord:
    """A record of the input."""

    kind: str
    """`CHAT` or `TEXT`."""
    fields: dict[str, Any]
    """Its other fields."""
    messages: tuple[Message, ...]
    """Of a document: one."""

    def media(self) -> Iterator[Part]:
        """Yield its media, in order."""
        for message in self.messages:
            yield from (part for part in message.parts or () if part.kind in KINDS)


def parse_record(line: bytes) -> MediaRecord:
    """Return the record of a line.

    Raises:
        BadRecord: it is no chat or document, a part is none, or its text spells a token of media.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({e}); every line must be one JSON object") from None
    refuse_deep(record)
    if not isinstance(record, dict) or ("messages" in record) == ("content" in record):
        raise BadRecord("fields", "must be an object with either 'messages' (a chat) or 'content' (a "
                                  "document)")
    if MEDIA in record:
        raise BadRecord("fields", f"has a field {MEDIA!r}, which this step writes; remove it")
    if "content" in record:
        kind, own = TEXT, "content"
        messages = [Message({}, _parts(record["content"], "content"))]
    else:
        kind, own = CHAT, "messages"
        messages = _messages(record["messages"])
    fields = {name: value for name, value in record.items() if name != own}
    if kind == TEXT and "text" in fields:
        raise BadRecord("fields", "has both 'content' and 'text'; leave one out")
    _refuse_marks([fields, *(m.fields for m in messages),
                   *(p.value for m in messages for p in m.parts or () if p.kind == "text")])
    return MediaRecord(kind, fields, tuple(messages))


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRecord("fields", "'messages' must be a non-empty list of objects with 'role' and 'content'")
    found = []
    for i, message in enumerate(value):
        fields = {name: part for name, part in message.items() if name != "content"}
        content = message.get("content")
        found.append(Message(fields, None if content is None else _parts(content, f"messages[{i}].content")))
    return found


def _parts(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),)
    if not isinstance(content, list) or not content:
        raise BadRecord("fields", f"{where} is {str(content)[:80]!r}, must be a string or a list of parts")
    return tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part("text", part["text"])
    if kind not in KINDS or not isinstance(part.get("path"), str):
        raise BadRecord("fields", f"{where} is {str(part)[:80]!r}, must be "
                                  '{"type": "text", "text": ...} or {"type": "image", "path": ...}, '
                                  '"audio" or "video"')
    frames_per_s = part.get("frames_per_s", 1.0)
    if isinstance(frames_per_s, bool) or not isinstance(frames_per_s, (int, float)) \
            or not 0 < frames_per_s <= 1000:
        raise BadRecord("fields", f"{where}.frames_per_s is {str(frames_per_s)[:40]!r}, must be a positive "
                                  "number "
                                  "up to 1000")
    return Part(kind, part["path"], float(frames_per_s))


def _refuse_marks(values: list[Any]) -> None:
    """Refuse a record that would bring tokens of media by spelling them."""
    if mark := spelled(json.dumps(values, ensure_ascii=False)):
        raise BadRecord("mark", f"spells {mark!r}, which is a token of media; remove it: media are named by "
                                "their paths alone")
