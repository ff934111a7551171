"""What the openai client reads of answers in scripts whose characters take several tokens: Korean, Thai,
emoji.  The model is a script; requests, replies and the client are the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sov.infer.request import LENGTH, STOP
from megatron_sov.serve.bodies import BodyReader, RefusedRequest, chat_question, completion_question
from megatron_sov.serve.replies import ServedReply, event
from megatron_sov.serve.scheduler import Begun

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MERGES = [("Ġ", "ð"), ("Ġð", "Ł"), ("ð", "Ł"), ("ì", "ķ"), ("ķ", "Ī"), ("h", "i"), ("à", "¸")]
"""Tokens that are a part of a character, one with a blank before it, and a whole word."""
ANSWERS = ["안녕하세요", "สวัสดี hi", "🐻‍❄️ 🐻", "hi 안 🐻 \\ \"'", "é ﷽ 𝒳\n\t", "plain", "\ufffd?"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(
        [*alphabet, *(a + b for a, b in MERGES)])}, MERGES))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML,
                            extra_special_tokens=SPECIAL[:1]).save_pretrained(path)
    return path, Tokenizer.from_file(str(path / "tokenizer.json"))


Ask = Callable[..., openai.OpenAI]


@pytest.fixture(scope="module")
def client(tokenizer: tuple[Path, Tokenizer]) -> Ask:
    """Return `client(ids)`: a client of a server whose model writes these ids."""
    path, _ = tokenizer
    target: Any = SimpleNamespace(tokenizer_folder=path, vocab_size=300, is_hf=False, path=path)
    reader = BodyReader(target, 1000)

    def answering(ids: list[int]) -> openai.OpenAI:
        def handle(request: httpx.Request) -> httpx.Response:
            read = chat_question if request.url.path.endswith("chat/completions") else completion_question
            try:
                question = read(request.content, "m")
                body = reader.read(question)
            except RefusedRequest as e:
                return httpx.Response(e.status, text=e.body())
            begun = Begun(tuple(map(len, body.prompts)), body.in_thoughts, body.end_ids)
            reply = ServedReply(question, begun, reader, "m")
            events = reply.opening()
            for index, writing in enumerate(reply.writings):
                for place, token in enumerate(ids):
                    reason = STOP if token in body.end_ids else LENGTH if place == len(ids) - 1 else None
                    if writing.reason is None:
                        writing.add(token, reason)
                        events += reply.news(index) if question.is_stream else []
            if question.is_stream:
                return httpx.Response(200, content=b"".join(map(event, [*events, *reply.closing()])),
                                      headers={"Content-Type": "text/event-stream"})
            return httpx.Response(200, json=reply.whole())

        http: Any = httpx.Client(transport=httpx.MockTransport(handle))
        return openai.OpenAI(base_url="http://here/v1", api_key="none", max_retries=0, http_client=http)

    return answering


def ids_of(tokenizer: tuple[Path, Tokenizer], text: str, ends: bool = True) -> list[int]:
    made = tokenizer[1]
    end = int(made.token_to_id("<|im_end|>") or 0)
    return [*made.encode(text, add_special_tokens=False).ids, *([end] if ends else [])]


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_characters_of_several_tokens_arrive_whole(client: Ask, tokenizer: tuple[Path, Tokenizer], text: str,
                                                   is_stream: bool) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    completions = client(ids_of(tokenizer, text)).chat.completions
    if is_stream:
        said = "".join(c.choices[0].delta.content or "" for c in completions.create(**asked, stream=True)
                       if c.choices)
    else:
        said = completions.create(**asked).choices[0].message.content or ""
    assert said == text
