"""A conversation with one model behind an OpenAI-compatible address: its turns, its answers as they are
written, its calls of tools, and its row as `sov-data pack --format chat` reads it.  No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.infer.request import STOP
from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered, decoded, reason_of
from megatron_sov.work.endpoints.transport import Transport

ANSWER_LIMIT_S = 3600.0
MAX_CALLS = 16
"""Rounds of calls of tools in one answer."""
CALLS = "tool_calls"


@dataclass(frozen=True)
class ChatModel:
    """A model that can be asked."""

    name: str
    """At its address."""
    transport: Transport
    """Posts to its `/chat/completions`."""
    context_tokens: int | None
    """Longest conversation with its answer; None: the address does not say."""
    takes_thoughts: bool
    """Whether its template decides what becomes of earlier thoughts, so that they are sent back."""


def models_at(url: str, key_env: str, names: Sequence[str] = (), key: str = "") -> list[ChatModel]:
    """Return the models at an address.

    Args:
        url: up to `/v1`.
        key_env: variable of the environment with the key.
        names: of the models; none: the only one there.
        key: of a server of one's own.

    Raises:
        UserError: nothing answers, or a model has no chat template, or several are there and none is named.
    """
    try:
        came = Transport(f"{url}/models", key_env, 60.0, key).get()
        if came.status != 200:
            raise BadAnswer(reason_of(came.body) or f"it answered HTTP {came.status}")
        cards = {str(card["id"]): card for card in decoded(came.body)["data"]}
    except (BadAnswer, TimeoutError, LookupError, TypeError) as e:
        raise UserError(f"{url}: the models cannot be listed ({e}); look at the address and the "
                        "key") from None
    if not names and len(cards) != 1:
        raise UserError(f"{url}: has {len(cards)} models ({', '.join([*cards][:8])}); name one with --model")
    found = []
    for name in names or cards:
        card = cards.get(name)
        if card is None:
            raise UserError(f"--model {name}: {url} has {', '.join([*cards][:8])}; name one of them")
        if card.get("has_chat_template") is False:
            raise UserError(f"{name}: has no chat template, so it cannot hold a conversation; fine-tune it "
                            "on chats first, or continue texts with `megatron-sov generate`")
        context = card.get("max_model_len")
        found.append(ChatModel(name, Transport(f"{url}/chat/completions", key_env, ANSWER_LIMIT_S, key),
                               context if isinstance(context, int) else None, bool(key)))
    return found


@dataclass
class ChatAnswer:
    """One message of a model, as much of it as was written."""

    content: str = ""
    thoughts: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """As OpenAI spells them."""
    reason: str = ""
    """Why it ended; empty: it was stopped."""

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.content,
                **({"reasoning_content": self.thoughts} if self.thoughts else {}),
                **({"tool_calls": self.calls} if self.calls else {})}


@dataclass
class ChatTurn:
    """What the user said, and all that followed it."""

    user: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Of the model and of tools."""
    is_whole: bool = False
    """Whether the last message ended by itself."""
    state: str = ""
    """Of the tools before it."""

    def as_messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.user}, *self.messages]


class ChatScreen(Protocol):
    """Where an answer is shown."""

    def think(self, piece: str) -> None:
        """Show a piece of the thoughts."""

    def say(self, piece: str) -> None:
        """Show a piece of the answer."""

    def call(self, name: str, arguments: str) -> None:
        """Show a call of a tool."""

    def result(self, text: str) -> None:
        """Show what a call gave."""

    def note(self, text: str) -> None:
        """Show what the user should know."""


class ChatTools(Protocol):
    """What answers calls."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """What may be called, as OpenAI describes functions."""

    @property
    def state(self) -> str:
        """What `restore` goes back to."""

    def call(self, call: ToolCall) -> str:
        """Return what a call gives."""

    def restore(self, state: str) -> None:
        """Go back."""


class ChatSession:
    """A conversation.

    Args:
        model: which answers.
        sampling: fields of each request, such as `temperature`; may change between turns.
        tools: what answers its calls; None: there are none.
    """

    def __init__(self, model: ChatModel, sampling: dict[str, Any], tools: ChatTools | None = None) -> None:
        self.model, self.sampling, self._tools = model, sampling, tools
        self.system = ""
        """What goes before all turns."""
        self.turns: list[ChatTurn] = []
        self._first = 0
        self._num_requests = 0

    def ask(self, text: str, screen: ChatScreen) -> None:
        """Have the model answer, shown as it is written.

        An answer that is stopped by KeyboardInterrupt, or breaks off, stays as far as it came; a turn without
        any answer is forgotten.

        Raises:
            BadAnswer: the model does not answer.
            TimeoutError: it takes too long.
        """
        turn = ChatTurn(text, state=self._tools.state if self._tools else "")
        self.turns.append(turn)
        try:
            for _ in range(MAX_CALLS):
                answer = self._write(turn, screen)
                if not answer.calls or not self._tools:
                    break
                turn.messages += self._results(answer.calls, screen)
            else:
                screen.note(f"the model has called tools {MAX_CALLS} times; its answer ends here")
        finally:
            # results without an answer, or a call without its results, are no conversation
            while turn.messages and (turn.messages[-1]["role"] == "tool" or turn.messages[-1].get(CALLS)):
                turn.messages.pop()
            if not turn.messages:
                self.undo()

    def undo(self) -> str:
        """Forget the last turn, and what tools did in it; returns what the user had said."""
        turn = self.turns.pop()
        self._first = min(self._first, len(self.turns))
        if self._tools is not None:
            self._tools.restore(turn.state)
        return turn.user

    def clear(self) -> None:
        """Begin a conversation of the same system prompt."""
        while self.turns:
            self.undo()

    def row(self) -> dict[str, Any] | None:
        """Return the conversation as a row of chats; None where nothing of it can be learned.

        Answers that were cut or stopped are marked, since an end that is none should not be learned; so are
        earlier ones with thoughts, which most templates drop.
        """
        messages = self._system()
        for turn in self.turns:
            found = [dict(message) for message in turn.as_messages()]
            if not turn.is_whole:
                found[-1]["train"] = False
            for message in found if turn is not self.turns[-1] else ():
                if message.pop("reasoning_content", None):
                    message["train"] = False
            messages += found
        if not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
            return None
        return {"messages": messages, **({"tools": list(self._tools.tools)} if self._tools else {}),
                "model": self.model.name}

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _messages(self) -> list[dict[str, Any]]:
        messages = [*self._system(), *(m for turn in self.turns[self._first:] for m in turn.as_messages())]
        if self.model.takes_thoughts:
            return messages
        return [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]

    def _write(self, turn: ChatTurn, screen: ChatScreen) -> ChatAnswer:
        answer = ChatAnswer()
        try:
            for delta, reason in self._deltas(screen):
                if piece := delta.get("reasoning_content") or delta.get("reasoning"):
                    answer.thoughts += piece
                    screen.think(piece)
                if piece := delta.get("content"):
                    answer.content += piece
                    screen.say(piece)
                _add_calls(answer.calls, delta.get(CALLS) or [])
                answer.reason = reason or answer.reason
        finally:
            # what was stopped while it wrote a call has no call
            if answer.reason != CALLS and not (answer.reason == STOP and answer.calls):
                answer.calls = []
            if answer.content or answer.calls:
                turn.messages.append(answer.message())
                turn.is_whole = answer.reason == STOP
        return answer

    def _deltas(self, screen: ChatScreen) -> Iterator[tuple[Mapping[str, Any], str | None]]:
        """Yield the pieces of an answer and why it ended; without the oldest turns where all are too long."""
        while True:
            seed = self.sampling.get("seed")
            body = {"model": self.model.name, "messages": self._messages(), **self.sampling}
            if seed is not None:  # the same answer again is none that a second try is for
                body["seed"] = seed + self._num_requests
            if self._tools:
                body["tools"] = list(self._tools.tools)
            try:
                for part in self.model.transport.stream(body):
                    for choice in part.get("choices") or []:
                        yield choice.get("delta") or {}, choice.get("finish_reason")
                self._num_requests += 1
                return
            except NeverAnswered:
                if self._first >= len(self.turns) - 1:
                    raise
                self._first += 1
                screen.note("the conversation is longer than the model's context: the "
                            + ("oldest turn is" if self._first == 1 else f"{self._first} oldest turns are")
                            + " left out")

    def _results(self, calls: Sequence[Mapping[str, Any]], screen: ChatScreen) -> list[dict[str, Any]]:
        assert self._tools is not None
        results = []
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            screen.call(name, arguments)
            try:
                read = json.loads(arguments or "{}")
                text = self._tools.call(ToolCall(name, read)) if isinstance(read, dict) else (
                    "error: the arguments are no JSON object")
            except ValueError:
                text = "error: the arguments are no JSON"
            screen.result(text)
            results.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        return results


def _add_calls(calls: list[dict[str, Any]], pieces: Sequence[Mapping[str, Any]]) -> None:
    """Put pieces of calls together, each by its number."""
    for piece in pieces:
        number = min(piece.get("index", len(calls)), len(calls))
        if number == len(calls):
            calls.append({"id": f"call_{number}", "type": "function",
                          "function": {"name": "", "arguments": ""}})
        function = piece.get("function") or {}
        calls[number]["id"] = piece.get("id") or calls[number]["id"]
        calls[number]["function"]["name"] += function.get("name") or ""
        calls[number]["function"]["arguments"] += function.get("arguments") or ""


