"""Records as `sov-data pack` reads them: text in which tokens of media stand, and the rows of their banks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from data_prep.media.encoder import Medium
from data_prep.media.records import TEXT, MediaRecord, Message, Part
from data_prep.media.settings import CALL
from megatron_sov.documents import BadRecord
from megatron_sov.media.banks import KINDS as BANKS
from megatron_sov.media.banks import MEDIA
from megatron_sov.media.items import Item, drawing_call
from megatron_sov.media.vocabulary import AUDIO, IMAGE, VIDEO


class _Writer:
    """Puts the media of one record in their places."""

    def __init__(self, media: Mapping[Part, Medium], drawn: str) -> None:
        self._media, self._calls, self._numbers = media, drawn == CALL, Counter[str]()
        self.rows: dict[str, list[list[int]]] = {}
        """Bank -> row and used slots of each of its records, in the order of the placeholders."""

    def message(self, message: Message) -> dict[str, Any]:
        """Return a message with text for a content."""
        if message.parts is None:
            return message.fields
        if not message.is_drawn:
            return {**message.fields, "content": self.shown(message.parts)}
        return self._drawn(message)

    def shown(self, parts: tuple[Part, ...]) -> str:
        """Return text and items, each on lines of its own, as the published template joins them."""
        return "\n".join(part.value if part.kind == "text" else self._item(part) for part in parts)

    def _item(self, part: Part) -> str:
        medium = self._media[part]
        if medium.bank:
            self.rows.setdefault(medium.bank, []).extend(map(list, medium.rows))
        number = self._numbers[part.kind]
        self._numbers[part.kind] += 1
        name = PurePosixPath(part.value).name
        return Item(part.kind, number, medium.mime_type, name, medium.duration_s, medium.discrete,
                    sum(used for _, used in medium.rows)).text()

    def _drawn(self, message: Message) -> dict[str, Any]:
        """Return what a model says: sounds as discrete blocks in the text, pictures as tool calls or
        likewise."""
        said, calls = [], list(message.fields.get("tool_calls") or [])
        for part in message.parts or ():
            if part.kind == "text":
                said.append(part.value)
                continue
            block = self._media[part].discrete
            if part.kind == VIDEO or not block:
                needed = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}.get(part.kind)
                raise BadRecord("answer", f"has a {part.kind} ({part.value}) in what the assistant says, " + (
                    f"which needs {needed}" if needed else "and a model draws no videos; remove it"))
            if part.kind == IMAGE and self._calls:
                calls.append(drawing_call(block))
            else:
                said.append(block)
        return {**message.fields, "content": "\n".join(said), **({"tool_calls": calls} if calls else {})}


def encoded(record: MediaRecord, media: Mapping[Part, Medium], drawn: str = CALL) -> dict[str, Any]:
    """Return a record with text in the place of its media; `drawn` is `MediaSettings.drawn`.

    Raises:
        BadRecord: an assistant's medium has no discrete tokens.
    """
    writer = _Writer(media, drawn)
    if record.kind == TEXT:
        found: dict[str, Any] = {"text": writer.shown(record.messages[0].parts or ())}
    else:
        found = {"messages": [writer.message(message) for message in record.messages]}
    rows = {kind: writer.rows[kind] for kind in BANKS if kind in writer.rows}
    return {**record.fields, **found, MEDIA: rows}
