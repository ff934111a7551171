"""A conversation with one model behind an OpenAI-compatible address: its turns, its answers as they are
written.  No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.infer.request import STOP
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused, parse_json_answer, read_error_text
from megatron_sov.work.endpoints.transport import Transport

ANSWER_LIMIT_S = 3600.0


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


def model_at(url: str, key_env: str, name: str = "", key: str = "") -> ChatModel:
    """Return a model at an address.

    Args:
        url: up to `/v1`.
        key_env: variable of the environment with the key.
        name: of the model; empty: the only one there.
        key: of a server of one's own.

    Raises:
        UserError: nothing answers, or a model has no chat template, or several are there and none is named.
    """
    try:
        came = Transport(f"{url}/models", key_env, 60.0, key).get()
        if came.status != 200:
            raise BadAnswer(read_error_text(came.body) or f"it answered HTTP {came.status}")
        cards = {str(card["id"]): card for card in parse_json_answer(came.body)["data"]}
    except (BadAnswer, TimeoutError, LookupError, TypeError) as e:
        raise UserError(f"{url}: the models cannot be listed ({e}); look at the address and the "
                        "key") from None
    if not name and len(cards) != 1:
        raise UserError(f"{url}: has {len(cards)} models ({', '.join([*cards][:8])}); name one with --model")
    name = name or next(iter(cards))
    card = cards.get(name)
    if card is None:
        raise UserError(f"--model {name}: {url} has {', '.join([*cards][:8])}; name one of them")
    if card.get("has_chat_template") is False:
        raise UserError(f"{name}: has no chat template, so it cannot hold a conversation; fine-tune it "
                        "on chats first, or continue texts with `megatron-sov generate`")
    context = card.get("max_model_len")
    return ChatModel(name, Transport(f"{url}/chat/completions", key_env, ANSWER_LIMIT_S, key),
                     context if isinstance(context, int) else None, bool(key))


@dataclass
class ChatAnswer:
    """One message of a model, as much of it as was written."""

    content: str = ""
    thoughts: str = ""
    reason: str = ""
    """Why it ended; empty: it was stopped."""

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.content,
                **({"reasoning_content": self.thoughts} if self.thoughts else {})}


@dataclass
class ChatTurn:
    """What the user said, and all that followed it."""

    user: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Of the model."""
    is_whole: bool = False
    """Whether the last message ended by itself."""

    def as_messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.user}, *self.messages]


class ChatScreen(Protocol):
    """Where an answer is shown."""

    def think(self, piece: str) -> None:
        """Show a piece of the thoughts."""

    def say(self, piece: str) -> None:
        """Show a piece of the answer."""

    def note(self, text: str) -> None:
        """Show what the user should know."""


class ChatSession:
    """A conversation.

    Args:
        model: which answers.
        sampling: fields of each request, such as `temperature`.
    """

    def __init__(self, model: ChatModel, sampling: dict[str, Any]) -> None:
        self.model, self.sampling = model, sampling
        self.system = ""
        """What goes before all turns."""
        self.turns: list[ChatTurn] = []
        self._first = 0

    def ask(self, text: str, screen: ChatScreen) -> None:
        """Have the model answer, shown as it is written.

        An answer that is stopped by KeyboardInterrupt, or breaks off, stays as far as it came; a turn without
        any answer is forgotten.

        Raises:
            BadAnswer: the model does not answer.
            TimeoutError: it takes too long.
        """
        turn = ChatTurn(text)
        self.turns.append(turn)
        try:
            self._write(turn, screen)
        finally:
            if not turn.messages:
                self.turns.pop()
                self._first = min(self._first, len(self.turns))

    def clear(self) -> None:
        """Begin a conversation of the same system prompt."""
        self.turns.clear()
        self._first = 0

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _messages(self) -> list[dict[str, Any]]:
        messages = [*self._system(), *(m for turn in self.turns[self._first:] for m in turn.as_messages())]
        if self.model.takes_thoughts:
            return messages
        return [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]

    def _write(self, turn: ChatTurn, screen: ChatScreen) -> None:
        answer = ChatAnswer()
        try:
            for delta, reason in self._deltas(screen):
                if piece := delta.get("reasoning_content") or delta.get("reasoning"):
                    answer.thoughts += piece
                    screen.think(piece)
                if piece := delta.get("content"):
                    answer.content += piece
                    screen.say(piece)
                answer.reason = reason or answer.reason
        finally:
            if answer.content:
                turn.messages.append(answer.message())
                turn.is_whole = answer.reason == STOP

    def _deltas(self, screen: ChatScreen) -> Iterator[tuple[Mapping[str, Any], str | None]]:
        """Yield the pieces of an answer and why it ended; without the oldest turns where all are too long."""
        while True:
            body = {"model": self.model.name, "messages": self._messages(), **self.sampling}
            try:
                for part in self.model.transport.stream(body):
                    for choice in part.get("choices") or []:
                        yield choice.get("delta") or {}, choice.get("finish_reason")
                return
            except RequestRefused:
                if self._first >= len(self.turns) - 1:
                    raise
                self._first += 1
                screen.note("the conversation is longer than the model's context: the "
                            + ("oldest turn is" if self._first == 1 else f"{self._first} oldest turns are")
                            + " left out")
