"""What of a record is judged, by its kind."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.synth.checks.texts import NoSample, texts_of

TOLD = {"messages": [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "find", "arguments": {"id": "secret"}}}]},
    {"role": "tool", "content": "Busan"},
    {"role": "assistant", "content": "In Busan.", "reasoning_content": "The tool told me."}]}


def test_each_kind_has_its_texts() -> None:
    assert texts_of("text", {"text": "A tide."}) == {"samples": "A tide."}
    assert texts_of("chat", TOLD) == {
        "samples": "Where is it?\n\nBusan\n\nThe tool told me.\n\nIn Busan.", "context": "Be short.",
        "answers": "The tool told me.\n\nIn Busan."}
    assert texts_of("prompt", {"prompt": "1 + 1?", "answer": "2"}) == {"samples": "1 + 1?"}
    assert texts_of("prompt", {"prompt": TOLD["messages"][:2]}) == {
        "samples": "Where is it?", "context": "Be short."}
    assert texts_of("prompt", {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}) == {
        "samples": "1 + 1?\n\n2"}
    assert texts_of("task", {"question": "Mend it.", "files": {"a": "b"}}) == {"samples": "Mend it."}
    assert texts_of("task", {"world": {"tables": {}}}) == {}


@pytest.mark.parametrize(("kind", "record", "said"), [
    ("text", {"text": " \n"}, "holds no text"), ("text", {}, "no string field"),
    ("text", {"text": 3}, "no string field"),
    ("chat", {"messages": []}, "non-empty list"), ("chat", {"text": "no chat"}, "is plain text"),
    ("prompt", {}, "prompt"),
    ("chat", {"messages": [{"role": "user", "content": "Alone?"}]}, "assistant"),
    ("text", {"text": "\udc80"}, "surrogate"), ("task", {"question": "\udc80"}, "surrogate")])
def test_what_no_later_command_takes_is_no_sample(kind: Any, record: dict[str, Any], said: str) -> None:
    with pytest.raises(NoSample, match=said):
        texts_of(kind, record)


def test_text_longer_than_the_limit_is_no_sample() -> None:
    with pytest.raises(NoSample, match="at most"):
        texts_of("text", {"text": "x" * (33 << 20)})
