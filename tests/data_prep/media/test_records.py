"""Records that name media: what they may say, and marks that they may not bring."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_prep.media.records import CHAT, TEXT, parse_record
from megatron_sov.documents import BadRecord


def parsed(record: Any) -> Any:
    return parse_record(json.dumps(record).encode())


def test_chats_and_documents_keep_their_fields() -> None:
    chat = parsed({"id": "a", "messages": [{"role": "user", "name": "bo", "content": [
        {"type": "text", "text": "See"}, {"type": "image", "path": "a.png"}]}, {"role": "assistant",
                                                                                "content": "Ok"}]})
    assert (chat.kind, chat.fields, chat.messages[0].fields) == (CHAT, {"id": "a"},
                                                                 {"role": "user", "name": "bo"})
    assert [p.value for p in chat.media()] == ["a.png"]
    assert [m.is_drawn for m in chat.messages] == [False, True]
    document = parsed({"content": [{"type": "video", "path": "v", "frames_per_s": 2}]})
    assert document.kind == TEXT and next(document.media()).frames_per_s == 2.0


@pytest.mark.parametrize(("record", "words"), [
    ([], "an object with either"), ({}, "an object with either"), ({"messages": [], "content": "a"},
                                                                   "either"),
    ({"messages": []}, "non-empty list"), ({"messages": ["a"]}, "non-empty list"),
    ({"content": 3}, "must be a string or a list"), ({"content": []}, "must be a string or a list"),
    ({"content": [{"type": "image"}]}, "must be"), ({"content": [{"type": "image_url", "path": "a"}]},
                                                    "must be"),
    ({"content": [{"type": "video", "path": "a", "frames_per_s": 0}]}, "positive number"),
    ({"content": "a", "media": {}}, "which this step writes"), ({"content": "a", "text": "b"}, "both"),
    ({"content": "see <|vision00003|>"}, "spells '<|vision00003|>'"),
    ({"messages": [{"role": "user", "content": "a", "reasoning_content": "<|IMAGE_PAD|>"}]}, "spells"),
    ({"content": "a", "tools": [{"x": "<|mime_start|>"}]}, "spells '<|mime_start|>'")])
def test_what_is_no_record_is_told(record: Any, words: str) -> None:
    with pytest.raises(BadRecord) as found:
        parsed(record)
    assert words in found.value.reason


def test_escapes_of_json_hide_no_mark() -> None:
    with pytest.raises(BadRecord, match="spells"):
        parse_record(b'{"content": "\\u003c|vision00003|\\u003e"}')
    with pytest.raises(BadRecord, match="not valid JSON"):
        parse_record(b"{" + b"[" * 100_000)
