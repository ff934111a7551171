"""pack, serve, generate, chat and RL render a conversation exactly
like transformers' `apply_chat_template`."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.shards.encode import Encoder
from megatron_sov.base.documents import Conversation, RecordReading, read_documents
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import read_chat_encoder
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.serve.bodies import RequestEncoder, parse_chat_body
from megatron_sov.serve.chat_session import ChatModel, ChatSession, ChatTurn
from tests.chat.byte_tokenizer import build_byte_tokenizer
from tokenizer.cli import main

QWEN3 = (Path(__file__).parent / "qwen3.jinja").read_text()
UNIT = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Unit"}
"""What pydantic writes of an optional argument."""
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "strict": None, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "unit": UNIT}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
ARGUMENTS: dict[str, Any] = {"city": "서울", "unit": None, "days": [None, 1], "more": {"deep": None}}


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def build_calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


def text_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


REQUEST = [
    message("developer", "Be short."), message("user", text_parts("How is it", "in 서울? 🐻"), name=None),
    message("assistant", None, reasoning_content="I look\n  it up.",
            tool_calls=build_calls(json.dumps(ARGUMENTS)), refusal=None, annotations=[]),
    message("tool", text_parts("cold"), tool_call_id="c1")]
"""The conversation in a client's request."""
RENDERED = [message("system", "Be short."), message("user", "How is it\nin 서울? 🐻"),
            message("assistant", "", reasoning_content="I look\n  it up.", tool_calls=build_calls(ARGUMENTS)),
            message("tool", "cold", tool_call_id="c1")]
"""The conversation for transformers."""
ANSWER = message("assistant", "    indented", reasoning_content="So: cold.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, imported = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("imported") / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=build_byte_tokenizer(), eos_token="<|im_end|>", chat_template=QWEN3,
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"]).save_pretrained(path)
    assert main(["import", str(path), "--output", str(imported)]) == 0
    return imported


@pytest.fixture(scope="module")
def render(folder: Path) -> Any:
    """Return a function that renders messages with transformers."""
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)

    def render_messages(messages: list[dict[str, Any]], add_prompt: bool = True, tools: Any = TOOLS) -> str:
        return str(loaded.apply_chat_template(messages, tools=tools, add_generation_prompt=add_prompt,
                                              tokenize=False))
    return render_messages


@pytest.fixture(scope="module")
def target(folder: Path) -> Any:
    return SimpleNamespace(tokenizer_folder=folder, vocab_size=1000, is_hf=False, path=folder)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Return a file with the conversation as a prompt."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": REQUEST, "tools": TOOLS}) + "\n")
    return file


def test_rendered_text_contains_nulls(render: Any) -> None:
    text = render(RENDERED)
    for written in ('"unit": null', '"days": [null, 1], "more": {"deep": null}', '"default": null',
                    '"strict": null', "서울? 🐻", "<think>\nI look\n  it up.\n</think>"):
        assert written in text


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
def test_pack_renders_like_transformers(folder: Path, render: Any, tmp_path: Path, arguments: Any) -> None:
    sent = [*REQUEST[:2], {**REQUEST[2], "tool_calls": build_calls(arguments)}, *REQUEST[3:], ANSWER]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": sent, "tools": TOOLS}))
    encoder, [document] = Encoder(folder), read_documents([tmp_path / "a.jsonl"], RecordReading("chat"))
    ids = encoder.encode_batch([document]).ids.tolist()
    assert encoder.decode(ids) == render([*RENDERED, ANSWER], add_prompt=False) + "<|im_end|>", (
        "a document ends with eos")


def test_serve_renders_like_transformers(target: Any, render: Any) -> None:
    question = parse_chat_body(json.dumps({"messages": REQUEST, "tools": TOOLS}).encode(), "m")
    [ids] = RequestEncoder(target, 10_000).encode_request(question).prompts
    assert PromptEncoder(target, chat=True)._tokenizer.decode(ids) == render(RENDERED)


def test_generate_renders_like_transformers(target: Any, render: Any, prompt_file: Path) -> None:
    [prompt] = read_documents([prompt_file], RecordReading("prompt"))
    prompts = PromptEncoder(target, chat=True)
    [ids] = prompts.encode_prompts([prompt.conversation()])
    assert prompts._tokenizer.decode(ids) == render(RENDERED)
    [ids] = prompts.encode_prompts([text := "서울? \n"])
    loaded = PreTrainedTokenizerFast.from_pretrained(target.tokenizer_folder)
    assert prompts._tokenizer.decode(ids) == loaded.apply_chat_template(
        [message("user", text)], add_generation_prompt=True, tokenize=False)


def test_rl_renders_like_transformers(folder: Path, render: Any, prompt_file: Path) -> None:
    encoder = read_chat_encoder(folder)
    assert encoder is not None
    chat = read_prompts(prompt_file, is_asked=True)[0].conversation()
    assert encoder.decode(encoder.encode(chat, awaits_response=True).ids) == render(RENDERED)
    assert encoder.decode(TurnEncoder(encoder, "tok").opening(chat)) == render(RENDERED)


def test_chat_sends_messages_that_serve_renders_like_transformers(target: Any, render: Any) -> None:
    bodies: list[dict[str, Any]] = []

    class RecordingClient:
        def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            bodies.append(json.loads(json.dumps(body)))
            yield from ()

    session = ChatSession(ChatModel("m", cast(Any, RecordingClient()), None, True), {})
    session.system = "Be short."
    session.turns.append(ChatTurn("How is it\nin 서울? 🐻", [*REQUEST[2:], ANSWER]))
    session.ask("And now?", cast(Any, None))
    question = parse_chat_body(json.dumps(bodies[0]).encode(), "m")
    [chat] = question.prompts
    assert isinstance(chat, Conversation)
    encoder, prompts = RequestEncoder(target, 10_000), PromptEncoder(target, chat=True)
    assert prompts._tokenizer.decode(encoder.encode_request(question).prompts[0]) == render(
        [*RENDERED, ANSWER, message("user", "And now?")], tools=None)
