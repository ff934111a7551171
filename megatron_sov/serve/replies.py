"""Answers as OpenAI's objects: whole, or as the chunks of a stream."""

from __future__ import annotations

import codecs
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

from megatron_sov.chat.marks import (
    BEGIN_CALL, BEGIN_THOUGHTS, END_THOUGHTS, FAMILIES, LLAMA, PYTHON_TAG, CallForm, plain_form)
from megatron_sov.chat.tool_calls import ServedTurn, ToolCall, served_turn, split_thoughts, whole_turn
from megatron_sov.infer.request import LENGTH, STOP, StopRule, Written
from megatron_sov.serve.bodies import BodyReader, ServedQuestion
from megatron_sov.serve.scheduler import Begun

# What a model's turn says, thinks and calls, while it is being written and at its end.

_OTHERS = (*(mark for family in FAMILIES[1:] for mark in family), PYTHON_TAG)
_UNFINISHED = re.compile(r"(?:<\|start\|>[^<]*)?(?:<\|channel\|>[^<]*(?:<\|constrain\|>\w*)?)?\Z")
"""The frame of a part that has not begun yet."""


def turn_so_far(text: str, in_thoughts: bool, tools: Sequence[dict[str, Any]],
                form: CallForm | None = None) -> ServedTurn:
    """Return what is sure of a turn that is being written: the beginning of what `whole_turn` will say of
    it, without calls."""
    # Llama 3's calls have no mark: what they are shows at their end.
    if form == LLAMA and tools and text.lstrip()[:1] in ("{", ""):
        return ServedTurn("", "")
    has_tools = bool(tools)
    # What may be the beginning of a mark is held back until the next token decides.
    marks = (END_THOUGHTS, BEGIN_CALL) if has_tools else (END_THOUGHTS,)
    sure = _UNFINISHED.sub("", text[:len(text) - max(_begun_turn(text, mark) for mark in _OTHERS)])
    text = plain_form(sure, in_thoughts=in_thoughts)
    has_tools = has_tools or text != sure  # what a call becomes shows at its end alone
    text = text[:len(text) - max(_begun_turn(text, mark) for mark in marks)]
    # It may still turn out to be thoughts, so nothing is sure.
    if BEGIN_THOUGHTS.startswith(text.lstrip()):
        return ServedTurn("", "")
    thoughts, said = split_thoughts(text, in_thoughts)
    if has_tools:
        said = said.partition(BEGIN_CALL)[0].rstrip()
    return served_turn(thoughts, said)


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
                 end_ids: tuple[int, ...], *, is_empty: bool = False) -> None:
        """Begin with nothing.

        Args:
            decode: from ids to text.
            stops: strings that end the answer, and do not belong to it.
            end_ids: tokens that end it.
            is_empty: leave out the one token that a model writes to a client who asked for none.
        """
        self._decode, self._ends, self._is_empty = decode, end_ids, is_empty
        self._stop = StopRule(end_ids, stops, decode)
        self.tokens: list[int] = []
        """Ids, with the one that ends it."""
        self.logprobs: list[float] = []
        """Of each token."""
        self.prompt: list[Written] = []
        """Of the prompt's tokens from the second on, where they are asked for: the token and then the most
        probable ones, with log-probabilities."""
        self.tops: list[list[tuple[int, float]]] = []
        """Of each token, where they are asked for: the most probable ones in its place."""
        self.reason: str | None = None
        """What has ended it; None: nothing yet."""
        self._text, self._first, self._shown = "", 0, 0

    def add(self, token: int, logprob: float, reason: str | None, ranked: Sequence[Written] = ()) -> None:
        """Take the next token; what comes behind the end is passed over.

        Args:
            token: its id.
            logprob: its log-probability.
            reason: why the model goes on no further; None: it does.
            ranked: see `News`.
        """
        # A string ended it here, which the model does not know of; its next tokens may be under way.
        if self.reason is not None:
            return
        self.prompt += ranked[:-1]
        if self._is_empty:
            self.reason = LENGTH
            return
        self.tokens.append(token)
        if ranked:
            self.tops.append(top_of(ranked[-1]))
            logprob = ranked[-1][1][0]  # to the last bit what stands among the most probable ones
        self.logprobs.append(logprob)
        # Strings are found here, since the model sees tokens alone.
        self.reason = STOP if self._stop.ends(self.tokens) else reason

    def text(self) -> str:
        return self._stop.cut_text(self._decode(self.tokens))

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
        return self._stop.cut_text(self._text[:len(self._text) - held])


def top_of(ranked: Written) -> list[tuple[int, float]]:
    tokens, logprobs = ranked
    return list(zip(tokens[1:], logprobs[1:], strict=True))


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class TextOffsets:
    """Counts the characters before each token of a text; a token inside of a character begins with it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def add(self, pieces: Iterable[bytes]) -> list[int]:
        """Return the place of each of the next tokens, in characters.

        Args:
            pieces: the bytes of text of each.
        """
        found = []
        for piece in pieces:
            found.append(self._num_chars)
            self._num_chars += len(self._decoder.decode(piece))
        return found


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
        self._decode = reader.decoder(question)
        self.writings = [ReplyWriting(self._decode, reader.stops(question), begun.end_ids,
                                      is_empty=question.max_tokens == 0)
                         for _ in range(question.num_sequences)]
        """The answers, prompt by prompt."""
        self._offsets = [TextOffsets() for _ in self.writings]
        self._told = [ServedTurn("", "") for _ in self.writings]
        self._num_told = [0] * len(self.writings)

    @property
    def is_whole(self) -> bool:
        return all(writing.reason is not None for writing in self.writings)

    def whole(self) -> dict[str, Any]:
        return self._head | self._prompt_of_chat() | {
            "choices": [self._choice(i) for i in range(len(self.writings))], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        read = sum(self._begun.prompt_tokens)
        written = sum(len(writing.tokens) for writing in self.writings)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int) -> dict[str, Any]:
        writing = self.writings[index]
        tokens = self._new_tokens(index, writing)
        if not self._question.is_chat:
            return {"index": index, "text": self._text(index), **tokens,
                    "finish_reason": writing.reason}
        turn = self._turn(writing)
        message: dict[str, Any] = {"role": "assistant", "content": turn.content, "refusal": None}
        if turn.thoughts:
            message["reasoning_content"] = turn.thoughts
        if turn.calls:
            message |= {"content": turn.content or None, "tool_calls": _calls(turn.calls)}
        return {"index": index, "message": message, **tokens,
                "finish_reason": "tool_calls" if turn.calls else writing.reason}

    def _turn(self, writing: ReplyWriting) -> ServedTurn:
        if writing.reason is None:
            return turn_so_far(writing.sure_text(), self._begun.in_thoughts, self._question.tools,
                               self._reader.call_form)
        return whole_turn(writing.text(), self._begun.in_thoughts, self._question.tools,
                          self._reader.call_form)

    # streams

    def opening(self) -> list[dict[str, Any]]:
        if not self._question.is_chat:
            return []
        return [self._chunk(i, {"role": "assistant", "content": ""}, None, {"logprobs": None})
                | (self._prompt_of_chat() if not i else {}) for i in range(len(self.writings))]

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
        return [self._chunk(index, {"text": new}, writing.reason, self._new_tokens(index, writing))]

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
            chunks.append(self._chunk(index, delta, None, self._new_tokens(index, writing)))
        if writing.reason is not None:
            reason = "tool_calls" if turn.calls else writing.reason
            chunks.append(self._chunk(index, {}, reason, self._new_tokens(index, writing)))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        if not self._question.tells_usage:
            return []
        return [self._chunk_head() | {"choices": [], "usage": self.usage()}]

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._question.is_chat else {})

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None, tokens: dict[str, Any]
               ) -> dict[str, Any]:
        choice = {"delta": said} if self._question.is_chat else said
        return self._chunk_head() | {"choices": [
            {"index": index, **choice, **tokens, "finish_reason": reason}]}

    # tokens and their log-probabilities

    def _new_tokens(self, index: int, writing: ReplyWriting) -> dict[str, Any]:
        """Return what is told of the tokens that have come since it was asked last."""
        first, self._num_told[index] = self._num_told[index], len(writing.tokens)
        told: dict[str, Any] = {"logprobs": self._logprobs(index, first)}
        if self._question.with_ids:
            told["token_ids"] = writing.tokens[first:]
            if not first and not self._question.is_chat:
                told["prompt_token_ids"] = self._prompt_of(index)
        return told

    def _prompt_of_chat(self) -> dict[str, Any]:
        """Return what is told of a conversation's tokens, as vLLM does beside the choices."""
        return ({"prompt_token_ids": self._begun.prompts[0]}
                if self._question.is_chat and self._question.with_ids else {})

    def _logprobs(self, index: int, first: int) -> dict[str, Any] | None:
        writing = self.writings[index]
        if not self._question.with_logprobs:
            return None
        places = list(zip(writing.tokens[first:], writing.logprobs[first:],
                          writing.tops[first:] or [[]] * (len(writing.tokens) - first), strict=True))
        if self._question.is_chat:
            return {"content": [self._of_chat(token, logprob) | {
                "top_logprobs": [self._of_chat(*one) for one in top]} for token, logprob, top in places],
                "refusal": None}
        before = [(tokens[0], logprobs[0], top_of((tokens, logprobs))) for tokens, logprobs in writing.prompt]
        found = self._of_completion([*before, *places])
        ids = [token for token, _, _ in places]
        if self._question.echoes:  # nothing stands before the first
            prompt = list(self._prompt_of(index))
            ids = prompt + ids
            found["tokens"].insert(0, self._piece(prompt[0]))
            for name in ("token_logprobs", "top_logprobs"):
                if found[name] is not None:
                    found[name].insert(0, None)
        return found | {"text_offset": self._offsets[index].add(map(self._shown_bytes, ids))}

    def _shown_bytes(self, token: int) -> bytes:
        """Return a token's bytes of the text; none of a special token that does not show in it."""
        return self._reader.token_bytes(token) if self._decode([token]) else b""

    def _prompt_of(self, index: int) -> tuple[int, ...]:
        return self._begun.prompts[index // self._question.num_choices]

    def _piece(self, token: int) -> str:
        if self._question.names_ids:
            return f"token_id:{token}"
        spelled = self._reader.token_bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:  # as OpenAI shows a token that is a part of a character
            return f"{'' if self._question.is_chat else 'bytes:'}{repr(spelled)[2:-1]}"

    def _of_chat(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._piece(token), "logprob": logprob,
                "bytes": list(self._shown_bytes(token))}

    def _of_completion(self, places: Sequence[tuple[int, float, Sequence[tuple[int, float]]]]
                       ) -> dict[str, Any]:
        """Return what is told of tokens, of each with its most probable ones; among these it stands itself,
        and of two that read the same the more probable one."""
        piece = self._piece
        tops = [{piece(one): value for one, value in sorted([(token, logprob), *top], key=itemgetter(1))}
                for token, logprob, top in places] if self._question.num_top else None
        return {"tokens": [piece(token) for token, _, _ in places],
                "token_logprobs": [logprob for _, logprob, _ in places], "top_logprobs": tops}

    def _text(self, index: int) -> str:
        """Return a completion's text, with its prompt where it is asked for: ids of both are decoded as one,
        since they may share a character."""
        writing = self.writings[index]
        if not self._question.echoes:
            return writing.text()
        prompt = self._question.prompts[index // self._question.num_choices]
        if isinstance(prompt, str):
            return prompt + writing.text()
        whole = self._decode([*self._prompt_of(index), *writing.tokens])
        num_cut = len(self._decode(writing.tokens)) - len(writing.text())  # by a stop string
        return whole[:len(whole) - num_cut]


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
             "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            for call in calls]
