"""Bodies of requests: what is malformed is told in one sentence, which costs no more than the body."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from megatron_sov.serve.bodies import RefusedRequest, ServedQuestion, chat_question, completion_question

MANY = 20_000
HI = '"messages": [{"role": "user", "content": "hi"}]'
COSTLY = {
    "parts": (completion_question, f'{{"prompt": [{",".join(["{}"] * MANY)}]}}', "prompt is"),
    "messages": (chat_question, f'{{"messages": [{",".join(["0"] * MANY)}]}}', "messages is"),
    "names": (chat_question, f'{{{HI}, {",".join(f"{chr(34)}a{i}{chr(34)}:0" for i in range(MANY))}}}',
              "a0 is not known"),
    "options": (chat_question, f'{{{HI}, "stream_options": {{'
                + ",".join(f'"a{i}": true' for i in range(MANY)) + "}}", "stream_options is"),
    "role": (chat_question, f'{{"messages": [{{"role": "{"x" * MANY}", "content": "hi"}}]}}', "role 'xxx"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_body_that_is_wrong_all_over_costs_little_and_is_told_in_a_sentence(name: str) -> None:
    ask, body, said = COSTLY[name]
    tracemalloc.start()
    try:
        with pytest.raises(RefusedRequest, match=said) as refused:
            ask(body.encode(), "m")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.status == 400 and len(refused.value.body()) < 3000
    assert peak_bytes < 6_000_000


@pytest.mark.parametrize(("prompt", "prompts"), [
    ('"a"', ("a",)), ('["a", "b"]', ("a", "b")), ("[1, 2]", ((1, 2),)), ("[[1], [2, 3]]", ((1,), (2, 3)))])
def test_prompts_are_texts_or_ids(prompt: str, prompts: Any) -> None:
    assert completion_question(f'{{"prompt": {prompt}}}'.encode(), "m").prompts == prompts


@pytest.mark.parametrize(("options", "tells"), [("", False), (', "stream_options": {}', False),
                                                (', "stream_options": {"include_usage": true}', True)])
def test_a_stream_tells_usage_where_it_is_asked_to(options: str, tells: bool) -> None:
    asked: ServedQuestion = chat_question(f'{{{HI}, "stream": true{options}}}'.encode(), "m")
    assert asked.tells_usage is tells


@pytest.mark.parametrize("options", ['{"include_usag": true}', '{"include_usage": 1}', "[]"])
def test_options_of_a_stream_that_are_none_are_refused(options: str) -> None:
    with pytest.raises(RefusedRequest, match="stream_options is"):
        chat_question(f'{{{HI}, "stream_options": {options}}}'.encode(), "m")
