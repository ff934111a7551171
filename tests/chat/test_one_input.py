"""pack, serve, generate, chat and RL render a conversation exactly
like transformers' `apply_chat_template`."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.shards.encode import Encoder
from megatron_sov.base.documents import Conversation, RecordReading, read_documents
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import read_chat_encoder
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.serve.bodies import RequestEncoder, parse_chat_body
from megatron_sov.serve.chat_session import ChatModel, ChatSession, ChatTurn
from tokenizer.cli import main

QWEN3 = (Path(__file__).parent / "qwen3.jinja").read_text()
UNIT = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Unit"}
"""What pydantic writes of an optional argument."""
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "strict": None, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "unit": UNIT}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
ARGUMENTS: dict[str, Any] = {"city": "서울", "unit": None, "days": [None, 1], "more": {"deep": None}}


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SENT = [say("developer", "Be short."), say("user", parts("How is it", "in 서울? 🐻"), name=None),
        say("assistant", None, reasoning_content="I look\n  it up.", tool_calls=calls(json.dumps(ARGUMENTS)),
            refusal=None, annotations=[]), say("tool", parts("cold"), tool_call_id="c1")]
"""The conversation in a client's request."""
SHOWN = [say("system", "Be short."), say("user", "How is it\nin 서울? 🐻"),
         say("assistant", "", reasoning_content="I look\n  it up.", tool_calls=calls(ARGUMENTS)),
         say("tool", "cold", tool_call_id="c1")]
"""The conversation for transformers."""
ANSWER = say("assistant", "    indented", reasoning_content="So: cold.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path, imported = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("imported") / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=QWEN3,
                            extra_special_tokens=["<|im_start|>", "<|endoftext|>"]).save_pretrained(path)
    assert main(["import", str(path), "--output", str(imported)]) == 0
    return imported


@pytest.fixture(scope="module")
def shown(folder: Path) -> Any:
    """Return a function that renders messages with transformers."""
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)

    def render(messages: list[dict[str, Any]], asks: bool = True, tools: Any = TOOLS) -> str:
        return str(loaded.apply_chat_template(messages, tools=tools, add_generation_prompt=asks,
                                              tokenize=False))
    return render


@pytest.fixture(scope="module")
def target(folder: Path) -> Any:
    return SimpleNamespace(tokenizer_folder=folder, vocab_size=1000, is_hf=False, path=folder)


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """Return a file with the conversation as a prompt."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": SENT, "tools": TOOLS}) + "\n")
    return file


def test_rendered_text_contains_nulls(shown: Any) -> None:
    text = shown(SHOWN)
    for written in ('"unit": null', '"days": [null, 1], "more": {"deep": null}', '"default": null',
                    '"strict": null', "서울? 🐻", "<think>\nI look\n  it up.\n</think>"):
        assert written in text


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
def test_pack_renders_like_transformers(folder: Path, shown: Any, tmp_path: Path, arguments: Any) -> None:
    sent = [*SENT[:2], {**SENT[2], "tool_calls": calls(arguments)}, *SENT[3:], ANSWER]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": sent, "tools": TOOLS}))
    encoder, [document] = Encoder(folder), read_documents([tmp_path / "a.jsonl"], RecordReading("chat"))
    ids = encoder.encode_batch([document]).ids.tolist()
    assert encoder.decode(ids) == shown([*SHOWN, ANSWER], asks=False) + "<|im_end|>", (
        "a document ends with eos")


def test_serve_renders_like_transformers(target: Any, shown: Any) -> None:
    question = parse_chat_body(json.dumps({"messages": SENT, "tools": TOOLS}).encode(), "m")
    [ids] = RequestEncoder(target, 10_000).encode_request(question).prompts
    assert PromptEncoder(target, chat=True)._tokenizer.decode(ids) == shown(SHOWN)


def test_generate_renders_like_transformers(target: Any, shown: Any, line: Path) -> None:
    [prompt] = read_documents([line], RecordReading("prompt"))
    asker = PromptEncoder(target, chat=True)
    [ids] = asker.encode_prompts([prompt.conversation()])
    assert asker._tokenizer.decode(ids) == shown(SHOWN)
    [ids] = asker.encode_prompts([text := "서울? \n"])
    loaded = PreTrainedTokenizerFast.from_pretrained(target.tokenizer_folder)
    assert asker._tokenizer.decode(ids) == loaded.apply_chat_template(
        [say("user", text)], add_generation_prompt=True, tokenize=False)


def test_rl_renders_like_transformers(folder: Path, shown: Any, line: Path) -> None:
    encoder = read_chat_encoder(folder)
    assert encoder is not None
    chat = read_prompts(line, is_asked=True)[0].conversation()
    assert encoder.decode(encoder.encode(chat, awaits_response=True).ids) == shown(SHOWN)
    assert encoder.decode(TurnEncoder(encoder, "tok").opening(chat)) == shown(SHOWN)


def test_chat_sends_messages_that_serve_renders_like_transformers(target: Any, shown: Any) -> None:
    bodies: list[dict[str, Any]] = []

    class Silent:
        def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            bodies.append(json.loads(json.dumps(body)))
            yield from ()

    session = ChatSession(ChatModel("m", cast(Any, Silent()), None, True), {})
    session.system = "Be short."
    session.turns.append(ChatTurn("How is it\nin 서울? 🐻", [*SENT[2:], ANSWER]))
    session.ask("And now?", cast(Any, None))
    question = parse_chat_body(json.dumps(bodies[0]).encode(), "m")
    [chat] = question.prompts
    assert isinstance(chat, Conversation)
    encoder, asker = RequestEncoder(target, 10_000), PromptEncoder(target, chat=True)
    assert asker._tokenizer.decode(encoder.encode_request(question).prompts[0]) == shown(
        [*SHOWN, ANSWER, say("user", "And now?")], tools=None)
