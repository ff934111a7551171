"""Answers as OpenAI's objects: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sov.chat.marks import (
    BEGIN_CALL, BEGIN_THOUGHTS, END_THOUGHTS, FAMILIES, LLAMA, PYTHON_TAG, CallForm, to_hermes_form)
from megatron_sov.chat.tool_calls import (
    ServedTurn, ToolCall, build_served_turn, parse_served_turn, split_thoughts)
from megatron_sov.infer.request import STOP, StopRule
from megatron_sov.serve.bodies import BodyReader, ServedQuestion
from megatron_sov.serve.scheduler import Begun

# What a model's turn says, thinks and calls, while it is being written and at its end.

_OTHERS = (*(mark for family in FAMILIES[1:] for mark in family), PYTHON_TAG)


def turn_so_far(text: str, in_thoughts: bool, tools: Sequence[dict[str, Any]],
                form: CallForm | None = None) -> ServedTurn:
    """Return what is sure of a turn that is being written: the beginning of the result of
    `parse_served_turn`, without calls."""
    # Llama 3's calls have no mark: what they are shows at their end.
    if form == LLAMA and tools and text.lstrip()[:1] in ("{", ""):
        return ServedTurn("", "")
    has_tools = bool(tools)
    # What may be the beginning of a mark is held back until the next token decides.
    marks = (END_THOUGHTS, BEGIN_CALL) if has_tools else (END_THOUGHTS,)
    sure = text[:len(text) - max(_begun_turn(text, mark) for mark in _OTHERS)]
    text = to_hermes_form(sure, in_thoughts=in_thoughts)
    has_tools = has_tools or text != sure  # what a call becomes shows at its end alone
    text = text[:len(text) - max(_begun_turn(text, mark) for mark in marks)]
    # It may still turn out to be thoughts, so nothing is sure.
    if BEGIN_THOUGHTS.startswith(text.lstrip()):
        return ServedTurn("", "")
    thoughts, said = split_thoughts(text, in_thoughts)
    if has_tools:
        said = said.partition(BEGIN_CALL)[0].rstrip()
    return build_served_turn(thoughts, said)


def _begun_turn(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may begin a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


CUT_CHARACTER = "\ufffd"
"""What the beginning of a character of several tokens is shown as."""
DONE = b"data: [DONE]\n\n"


# One answer as it grows: its tokens, its text up to what ends it, and how much of the text is sure.


class ReplyWriting:
    """An answer that is being written."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...],
                 end_ids: tuple[int, ...]) -> None:
        """Begin with nothing.

        Args:
            decode: from ids to text.
            stops: strings that end the answer, and do not belong to it.
            end_ids: tokens that end it.
        """
        self._decode = decode
        self._stop = StopRule(end_ids, stops, decode)
        self.tokens: list[int] = []
        """Ids, with the one that ends it."""
        self.reason: str | None = None
        """What has ended it; None: nothing yet."""
        self._text, self._first, self._shown = "", 0, 0

    def add(self, token: int, reason: str | None) -> None:
        """Take the next token; what comes behind the end is passed over.

        Args:
            token: its id.
            reason: why the model goes on no further; None: it does.
        """
        # A string ended it here, which the model does not know of; its next tokens may be under way.
        if self.reason is not None:
            return
        self.tokens.append(token)
        # Strings are found here, since the model sees tokens alone.
        self.reason = STOP if self._stop.is_met(self.tokens) else reason

    def text(self) -> str:
        return self._stop.truncate_text(self._decode(self.tokens))

    def sure_text(self) -> str:
        """Return the beginning of the text that what comes will not change, while it is being written.

        Tokens are decoded together with those before them that have been shown, from the last place where
        that was whole, so that each is read a few times and not with all that went before.
        """
        # A token may decode differently alone: both texts begin at the same token.
        before = self._decode(self.tokens[self._first:self._shown])
        behind = self._decode(self.tokens[self._first:])
        if len(behind) > len(before) and not behind.endswith(CUT_CHARACTER):
            self._text += behind[len(before):]
            self._first, self._shown = self._shown, len(self.tokens)
        held = max((_begun(self._text, stop) for stop in self._stop.texts), default=0)
        return self._stop.truncate_text(self._text[:len(self._text) - held])


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class ServedReply:
    """What is said to one request.

    Args:
        question: the request.
        begun: how many tokens its prompts have.
        reader: of the model.
        model: its name.
    """

    def __init__(self, question: ServedQuestion, begun: Begun, reader: BodyReader, model: str) -> None:
        self._question, self._begun, self._reader = question, begun, reader
        chat = question.is_chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                      "object": "chat.completion" if chat else "text_completion",
                      "created": int(time.time()), "model": model}
        self.writings = [ReplyWriting(reader.decoder(question), reader.stops(question), begun.end_ids)
                         for _ in range(question.num_sequences)]
        """The answers, prompt by prompt."""
        self._told = [ServedTurn("", "") for _ in self.writings]

    @property
    def is_whole(self) -> bool:
        return all(writing.reason is not None for writing in self.writings)

    def whole(self) -> dict[str, Any]:
        return self._head | {
            "choices": [self._choice(i) for i in range(len(self.writings))], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        read = sum(self._begun.prompt_tokens)
        written = sum(len(writing.tokens) for writing in self.writings)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int) -> dict[str, Any]:
        writing = self.writings[index]
        if not self._question.is_chat:
            return {"index": index, "text": writing.text(), "logprobs": None,
                    "finish_reason": writing.reason}
        turn = self._turn(writing)
        message: dict[str, Any] = {"role": "assistant", "content": turn.content, "refusal": None}
        if turn.thoughts:
            message["reasoning_content"] = turn.thoughts
        if turn.calls:
            message |= {"content": turn.content or None, "tool_calls": _calls(turn.calls)}
        return {"index": index, "message": message, "logprobs": None,
                "finish_reason": "tool_calls" if turn.calls else writing.reason}

    def _turn(self, writing: ReplyWriting) -> ServedTurn:
        if writing.reason is None:
            return turn_so_far(writing.sure_text(), self._begun.in_thoughts, self._question.tools,
                               self._reader.call_form)
        return parse_served_turn(writing.text(), self._begun.in_thoughts, self._question.tools,
                          self._reader.call_form)

    # streams

    def opening(self) -> list[dict[str, Any]]:
        if not self._question.is_chat:
            return []
        return [self._chunk(i, {"role": "assistant", "content": ""}, None)
                for i in range(len(self.writings))]

    def news(self, index: int) -> list[dict[str, Any]]:
        writing = self.writings[index]
        if self._question.is_chat:
            return self._chat_news(index, writing)
        text = writing.sure_text() if writing.reason is None else writing.text()
        # Sure text only grows, so what is new is its end.
        new = text[len(self._told[index].content):]
        if not new and writing.reason is None:
            return []
        self._told[index] = ServedTurn("", text)
        return [self._chunk(index, {"text": new}, writing.reason)]

    def _chat_news(self, index: int, writing: ReplyWriting) -> list[dict[str, Any]]:
        turn, told = self._turn(writing), self._told[index]
        delta: dict[str, Any] = {}
        if thoughts := turn.thoughts[len(told.thoughts):]:
            delta["reasoning_content"] = thoughts
        if content := turn.content[len(told.content):]:
            delta["content"] = content
        if turn.calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(_calls(turn.calls))]
        self._told[index] = turn
        chunks = []
        if delta:
            # The reason goes alone in the last chunk, as OpenAI sends it.
            chunks.append(self._chunk(index, delta, None))
        if writing.reason is not None:
            reason = "tool_calls" if turn.calls else writing.reason
            chunks.append(self._chunk(index, {}, reason))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        if not self._question.tells_usage:
            return []
        return [self._chunk_head() | {"choices": [], "usage": self.usage()}]

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._question.is_chat else {})

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"delta": said} if self._question.is_chat else said
        return self._chunk_head() | {"choices": [
            {"index": index, **choice, "logprobs": None, "finish_reason": reason}]}


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
             "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            for call in calls]
