"""Build OpenAI's response objects, whole or as chunks of a stream."""

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
from megatron_sov.serve.bodies import CompletionRequest, RequestEncoder
from megatron_sov.serve.scheduler import RequestStarted

REPLACEMENT_CHARACTER = "\ufffd"
"""Decoded text for an incomplete character, of which more tokens follow."""
DONE = b"data: [DONE]\n\n"
"""Last event in a stream."""
_OTHER_MARKS = (*(mark for family in FAMILIES[1:] for mark in family), PYTHON_TAG)


class CompletionReply:
    """The response to a request.

    Args:
        request: parsed body.
        started: prompt lengths and stop tokens.
        encoder: decodes tokens and parses tool calls.
        model: served name.
    """

    def __init__(self, request: CompletionRequest, started: RequestStarted, encoder: RequestEncoder,
                 model: str) -> None:
        self._request, self._started, self._encoder = request, started, encoder
        is_chat = request.is_chat
        self._head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
                      "object": "chat.completion" if is_chat else "text_completion",
                      "created": int(time.time()), "model": model}
        self.answers = [AnswerText(encoder.get_decoder(request), encoder.list_text_stops(request),
                                   started.end_ids) for _ in range(request.num_sequences)]
        """Answers ordered by prompt, then by choice."""
        self._streamed = [ServedTurn("", "") for _ in self.answers]

    @property
    def is_complete(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def build_response(self) -> dict[str, Any]:
        choices = [self._build_choice(i) for i in range(len(self.answers))]
        return self._head | {"choices": choices, "usage": self.count_usage()}

    def count_usage(self) -> dict[str, int]:
        prompt_tokens = sum(self._started.prompt_tokens)
        completion_tokens = sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens}

    def build_first_chunks(self) -> list[dict[str, Any]]:
        if not self._request.is_chat:
            return []
        return [self._build_chunk(i, {"role": "assistant", "content": ""}, None)
                for i in range(len(self.answers))]

    def build_new_chunks(self, index: int) -> list[dict[str, Any]]:
        """Build the chunks for text that became stable since the last call."""
        answer = self.answers[index]
        if self._request.is_chat:
            return self._build_chat_chunks(index, answer)
        text = answer.get_stable_text() if answer.finish_reason is None else answer.get_text()
        # stable text only grows
        new_text = text[len(self._streamed[index].content):]
        if not new_text and answer.finish_reason is None:
            return []
        self._streamed[index] = ServedTurn("", text)
        return [self._build_chunk(index, {"text": new_text}, answer.finish_reason)]

    def build_last_chunks(self) -> list[dict[str, Any]]:
        if not self._request.include_usage:
            return []
        return [self._build_chunk_head() | {"choices": [], "usage": self.count_usage()}]

    def _build_choice(self, index: int) -> dict[str, Any]:
        answer = self.answers[index]
        if not self._request.is_chat:
            return {"index": index, "text": answer.get_text(), "logprobs": None,
                    "finish_reason": answer.finish_reason}
        turn = self._parse_turn(answer)
        message: dict[str, Any] = {"role": "assistant", "content": turn.content, "refusal": None}
        if turn.thoughts:
            message["reasoning_content"] = turn.thoughts
        if turn.calls:
            message |= {"content": turn.content or None, "tool_calls": _build_calls(turn.calls)}
        return {"index": index, "message": message, "logprobs": None,
                "finish_reason": "tool_calls" if turn.calls else answer.finish_reason}

    def _parse_turn(self, answer: "AnswerText") -> ServedTurn:
        if answer.finish_reason is None:
            return parse_partial_turn(answer.get_stable_text(), self._started.in_thoughts,
                                      self._request.tools, self._encoder.call_form)
        return parse_served_turn(answer.get_text(), self._started.in_thoughts, self._request.tools,
                                 self._encoder.call_form)

    def _build_chat_chunks(self, index: int, answer: "AnswerText") -> list[dict[str, Any]]:
        turn, streamed = self._parse_turn(answer), self._streamed[index]
        delta: dict[str, Any] = {}
        if thoughts := turn.thoughts[len(streamed.thoughts):]:
            delta["reasoning_content"] = thoughts
        if content := turn.content[len(streamed.content):]:
            delta["content"] = content
        if turn.calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(_build_calls(turn.calls))]
        self._streamed[index] = turn
        chunks = []
        if delta:
            chunks.append(self._build_chunk(index, delta, None))
        if answer.finish_reason is not None:
            # alone in the last chunk, as in OpenAI's API
            reason = "tool_calls" if turn.calls else answer.finish_reason
            chunks.append(self._build_chunk(index, {}, reason))
        return chunks

    def _build_chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._request.is_chat else {})

    def _build_chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"delta": content} if self._request.is_chat else content
        return self._build_chunk_head() | {"choices": [
            {"index": index, **choice, "logprobs": None, "finish_reason": reason}]}


class AnswerText:
    """An answer in progress: tokens and decoded text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...],
                 end_ids: tuple[int, ...]) -> None:
        """Create an empty answer.

        Args:
            decode: token ids -> text.
            stops: stop strings, removed from the text.
            end_ids: stop tokens.
        """
        self._decode = decode
        self._stop = StopRule(end_ids, stops, decode)
        self.tokens: list[int] = []
        """Token ids with the stop token."""
        self.finish_reason: str | None = None
        self._text, self._begin, self._decoded = "", 0, 0

    def add_token(self, token: int, reason: str | None) -> None:
        """Append a token; `reason` ends the answer. Tokens after a stop string are ignored."""
        # only this process knows stop strings: the model may have sent more tokens
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        self.finish_reason = STOP if self._stop.is_met(self.tokens) else reason

    def get_text(self) -> str:
        return self._stop.truncate_text(self._decode(self.tokens))

    def get_stable_text(self) -> str:
        """Return the beginning of the text that later tokens cannot change.

        Decoding starts at the last position with complete characters, so that its cost does not grow with the
        answer.
        """
        # a token may decode to another text without its predecessors: both texts begin at the same token
        previous = self._decode(self.tokens[self._begin:self._decoded])
        current = self._decode(self.tokens[self._begin:])
        if len(current) > len(previous) and not current.endswith(REPLACEMENT_CHARACTER):
            self._text += current[len(previous):]
            self._begin, self._decoded = self._decoded, len(self.tokens)
        num_open = max((_count_open_chars(self._text, stop, len(stop)) for stop in self._stop.texts),
                       default=0)
        return self._stop.truncate_text(self._text[:len(self._text) - num_open])


def parse_partial_turn(text: str, in_thoughts: bool, tools: Sequence[dict[str, Any]],
                       form: CallForm | None = None) -> ServedTurn:
    """Parse an incomplete turn; return the part of `parse_served_turn`'s result that cannot change, without
    tool calls."""
    # Llama 3's calls have no mark: only a complete text shows whether it is a call
    if form == LLAMA and tools and text.lstrip()[:1] in ("{", ""):
        return ServedTurn("", "")
    has_tools = bool(tools)
    # omit the last characters if they may begin a mark
    marks = (END_THOUGHTS, BEGIN_CALL) if has_tools else (END_THOUGHTS,)
    stable = _drop_open_mark(text, _OTHER_MARKS)
    text = to_hermes_form(stable, in_thoughts=in_thoughts)
    has_tools = has_tools or text != stable  # a call changes its text at its end
    text = _drop_open_mark(text, marks)
    if BEGIN_THOUGHTS.startswith(text.lstrip()):  # may become thoughts
        return ServedTurn("", "")
    thoughts, content = split_thoughts(text, in_thoughts)
    if has_tools:
        content = content.partition(BEGIN_CALL)[0].rstrip()
    return build_served_turn(thoughts, content)


def _drop_open_mark(text: str, marks: Sequence[str]) -> str:
    return text[:len(text) - max(_count_open_chars(text, mark, len(mark) - 1) for mark in marks)]


def _count_open_chars(text: str, mark: str, max_chars: int) -> int:
    """Return how many characters at the end of a text, at most `max_chars`, may begin a mark."""
    return next((n for n in range(max_chars, 0, -1) if text.endswith(mark[:n])), 0)


def format_event(value: dict[str, Any]) -> bytes:
    """Format a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _build_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
             "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            for call in calls]
