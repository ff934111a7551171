"""What the openai client reads of answers in scripts whose characters take several tokens: Korean, Thai,
emoji.  The model is a script; requests, replies and the client are the real ones."""

from __future__ import annotations

import json
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
            reply = ServedReply(question, Begun(tuple(map(len, body.prompts)), body.in_thoughts, body.end_ids,
                                                tuple(map(tuple, body.prompts))), reader, "m")
            events = reply.opening()
            for index, writing in enumerate(reply.writings):
                prompt = body.prompts[index // question.num_choices]
                before = [ranked(token, question) for token in prompt[1:] if question.tells.prompt]
                for place, token in enumerate(ids):
                    reason = STOP if token in body.end_ids else LENGTH if place == len(ids) - 1 else None
                    told = [*(before if not place else []), ranked(token, question)]
                    if writing.reason is None:
                        writing.add(token, -1.0, reason, told if question.tells.something else ())
                        events += reply.news(index) if question.is_stream else []
            if question.is_stream:
                return httpx.Response(200, content=b"".join(map(event, [*events, *reply.closing()])),
                                      headers={"Content-Type": "text/event-stream"})
            return httpx.Response(200, json=reply.whole())

        http: Any = httpx.Client(transport=httpx.MockTransport(handle))
        return openai.OpenAI(base_url="http://here/v1", api_key="none", max_retries=0, http_client=http)

    return answering


def ranked(token: int, question: Any) -> tuple[list[int], list[float]]:
    """Return a token and the most probable ones: bytes that are no text alone, all of them."""
    tops = range(200, 200 + question.num_top)
    return [token, *tops], [-1.0, *(-2.0 - i for i in range(question.num_top))]


def ids_of(tokenizer: tuple[Path, Tokenizer], text: str, ends: bool = True) -> list[int]:
    made = tokenizer[1]
    end = int(made.token_to_id("<|im_end|>") or 0)
    return [*made.encode(text, add_special_tokens=False).ids, *([end] if ends else [])]


def spelled(token: str) -> bytes:
    """Return the bytes of a completion's token, as users of OpenAI's interface read them."""
    if not token.startswith("bytes:"):
        return token.encode()
    return token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_bytes_of_a_chats_tokens_are_the_answer(client: Ask, tokenizer: tuple[Path, Tokenizer], text: str,
                                                is_stream: bool) -> None:
    ids = ids_of(tokenizer, text)
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}], "logprobs": True,
                             "top_logprobs": 5}
    if is_stream:
        chunks = list(client(ids).chat.completions.create(**asked, stream=True, stream_options={
            "include_usage": True, "include_obfuscation": False}))
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        told = [one for c in chunks if c.choices and c.choices[0].logprobs
                for one in c.choices[0].logprobs.content or []]
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == len(ids)
    else:
        choice = client(ids).chat.completions.create(**asked).choices[0]
        assert choice.logprobs and choice.logprobs.content
        said, told = choice.message.content or "", choice.logprobs.content
    assert said == text and len(told) == len(ids)
    assert bytes(b for one in told for b in one.bytes or []) == text.encode()
    assert (told[-1].token, told[-1].bytes) == ("<|im_end|>", []), "which does not show in the text"
    for one in told[:-1]:
        assert one.bytes and one.token == (bytes(one.bytes).decode() if is_text(one.bytes) else
                                           repr(bytes(one.bytes))[2:-1])
        assert len({bytes(top.bytes or []) for top in one.top_logprobs}) == 5


def is_text(values: list[int]) -> bool:
    try:
        bytes(values).decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_tokens_of_a_completion_are_told_apart(client: Ask, tokenizer: tuple[Path, Tokenizer], text: str,
                                               is_stream: bool) -> None:
    ids = ids_of(tokenizer, text)
    asked: dict[str, Any] = {"model": "m", "prompt": "hi", "logprobs": 5, "max_tokens": len(ids)}
    if is_stream:
        choices = [c.choices[0] for c in client(ids).completions.create(**asked, stream=True)]
    else:
        choices = client(ids).completions.create(**asked).choices
    tokens = [token for c in choices for token in c.logprobs.tokens]
    offsets = [place for c in choices for place in c.logprobs.text_offset]
    assert "".join(c.text for c in choices) == text
    assert b"".join(map(spelled, tokens)) == f"{text}<|im_end|>".encode()
    if text == "안녕하세요":
        assert tokens[:2] == [r"bytes:\xec\x95", r"bytes:\x88"]
    assert {len(top) for c in choices for top in c.logprobs.top_logprobs} == {6}, "and the one that was drawn"
    begun = b""
    for token, place in zip(tokens, offsets, strict=True):
        assert place == len(begun.decode(errors="ignore"))
        begun += spelled(token)
    assert offsets[-1] == len(text)


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_is_prompt_and_answer_in_one(client: Ask, tokenizer: tuple[Path, Tokenizer], text: str,
                                             as_ids: bool) -> None:
    ids = ids_of(tokenizer, text, ends=False)
    for cut in range(1, len(ids)) if as_ids else [len(ids)]:
        prompt: Any = ids[:cut] if as_ids else text
        answer = ids[cut:] if as_ids else ids_of(tokenizer, " hi")
        asked: dict[str, Any] = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 1}
        choice = client(answer).completions.create(**asked, max_tokens=len(answer)).choices[0]
        whole = text if as_ids else f"{text} hi"
        assert choice.text == whole and choice.logprobs
        told = choice.logprobs
        shown = [*ids_of(tokenizer, text, ends=False)[:cut], *answer]
        assert len(told.tokens or []) == len(shown) == len(told.text_offset or []) == len(
            told.top_logprobs or [])
        assert told.token_logprobs == [None, *[-1.0] * (len(shown) - 1)]
        assert b"".join(map(spelled, told.tokens or [])).startswith(whole.encode())
        assert told.text_offset == sorted(told.text_offset or []) and told.text_offset[0] == 0


@pytest.mark.parametrize("text", ANSWERS)
def test_a_prompt_alone_is_told_of_without_an_answer(client: Ask, tokenizer: tuple[Path, Tokenizer],
                                                     text: str) -> None:
    ids = ids_of(tokenizer, text, ends=False)
    for prompt in (text, ids, ids[:1]):
        for logprobs in (None, 0, 2):
            found = client([7]).completions.create(model="m", prompt=prompt, echo=True, max_tokens=0,
                                                   logprobs=logprobs)
            choice, given = found.choices[0], ids[:1] if prompt == ids[:1] else ids
            assert choice.text == tokenizer[1].decode(given) and choice.finish_reason == "length"
            assert found.usage and found.usage.completion_tokens == 0
            assert found.usage.prompt_tokens == len(given)
            if logprobs is None:
                assert choice.logprobs is None
                continue
            assert choice.logprobs and choice.logprobs.token_logprobs == [None, *[-1.0] * (len(given) - 1)]
            assert len(choice.logprobs.tokens or []) == len(choice.logprobs.text_offset or []) == len(given)
            if logprobs:
                assert len(choice.logprobs.top_logprobs or []) == len(given)
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0 without echo"):
        client([7]).completions.create(model="m", prompt=text, max_tokens=0)


def test_a_stop_string_cuts_an_echo_of_ids(client: Ask, tokenizer: tuple[Path, Tokenizer]) -> None:
    ids = ids_of(tokenizer, "안녕 stop hi", ends=False)
    choice = client(ids[1:]).completions.create(model="m", prompt=ids[:1], echo=True, stop=" st",
                                                max_tokens=50).choices[0]
    assert (choice.text, choice.finish_reason) == ("안녕", "stop")


def test_what_a_server_returned_can_be_sent_back(client: Ask, tokenizer: tuple[Path, Tokenizer]) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be short."},
                           {"role": "user", "content": [{"type": "text", "text": "a"},
                                                        {"type": "text", "text": "안녕"}]}]
    made = client(ids_of(tokenizer, "hi"))
    first = made.chat.completions.create(model="m", messages=messages).choices[0].message
    returned: Any = first.model_dump() | {"annotations": [], "audio": None, "function_call": None}
    again = [*messages, returned, {"role": "user", "content": "and?"}]
    found = made.chat.completions.create(model="m", messages=again, extra_body={"return_token_ids": True})
    text = tokenizer[1].decode(json.loads(found.model_dump_json())["prompt_token_ids"],
                               skip_special_tokens=False)
    assert text == ("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\na\n안녕<|im_end|>\n"
                    "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
                    "<|im_start|>assistant\n")
