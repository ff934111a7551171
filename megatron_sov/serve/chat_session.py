"""A conversation with a model at an OpenAI-compatible address. No torch here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.infer.request import STOP
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused, parse_json_answer, read_error_text
from megatron_sov.work.endpoints.transport import Transport

ANSWER_LIMIT_S = 3600.0


@dataclass(frozen=True)
class ChatModel:
    name: str
    transport: Transport
    """Posts to `/chat/completions`."""
    context_tokens: int | None
    """Longest conversation with its answer; None if the server does not report it."""
    takes_thoughts: bool
    """Whether to send back earlier thoughts, for the chat template to keep or drop."""


def find_chat_model(url: str, key_env: str, name: str = "", key: str = "") -> ChatModel:
    """Find a chat model at an address.

    Args:
        url: address up to `/v1`.
        key_env: environment variable with the key.
        name: model name; empty for the only model.
        key: key of a local server.

    Raises:
        UserError: no answer, no chat template, or several models without `name`.
    """
    try:
        response = Transport(f"{url}/models", key_env, 60.0, key).get()
        if response.status_code != 200:
            raise BadAnswer(read_error_text(response.content) or f"it answered HTTP {response.status_code}")
        cards = {str(card["id"]): card for card in parse_json_answer(response.content)["data"]}
    except (BadAnswer, TimeoutError, LookupError, TypeError) as e:
        address = urlsplit(url)
        is_closed = address.hostname in ("localhost", "127.0.0.1") and "ConnectError" in str(e)
        fix = Fix(f"megatron-sov serve MODEL --port {address.port or 80}") if is_closed else None
        remedy = "start a server there, in another terminal" if is_closed else "check the address and the key"
        raise UserError(f"{url}: the models cannot be listed ({e}); {remedy}", fix) from None
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
    """A model's message, complete or interrupted."""

    content: str = ""
    thoughts: str = ""
    finish_reason: str = ""
    """Empty after an interrupt."""

    def to_message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thoughts:
            message["reasoning_content"] = self.thoughts
        return message


@dataclass
class ChatTurn:
    """A user message with the model's messages."""

    user: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    is_whole: bool = False
    """Whether the last message ended with a stop token."""


class ChatScreen(Protocol):
    """Display of a conversation."""

    def think(self, piece: str) -> None:
        """Show part of the thoughts."""

    def say(self, piece: str) -> None:
        """Show part of the content."""

    def note(self, text: str) -> None:
        """Show a note to the user."""


class ChatSession:
    """A conversation.

    Args:
        model: the model.
        sampling: fields for each request, such as `temperature`.
    """

    def __init__(self, model: ChatModel, sampling: dict[str, Any]) -> None:
        self.model, self.sampling = model, sampling
        self.system = ""
        """System prompt."""
        self.turns: list[ChatTurn] = []
        self._first_turn = 0

    def ask(self, text: str, screen: ChatScreen) -> None:
        """Send a user message, and show the answer while it arrives.

        KeyboardInterrupt and errors keep an incomplete answer; a turn without answer is dropped.

        Raises:
            BadAnswer: an error response.
            TimeoutError: no answer within `ANSWER_LIMIT_S`.
        """
        turn = ChatTurn(text)
        self.turns.append(turn)
        try:
            self._receive_answer(turn, screen)
        finally:
            if not turn.messages:
                self.turns.pop()
                self._first_turn = min(self._first_turn, len(self.turns))

    def clear(self) -> None:
        """Start a new conversation with the same system prompt."""
        self.turns.clear()
        self._first_turn = 0

    def _build_messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns[self._first_turn:]:
            messages += [{"role": "user", "content": turn.user}, *turn.messages]
        if self.model.takes_thoughts:
            return messages
        return [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]

    def _receive_answer(self, turn: ChatTurn, screen: ChatScreen) -> None:
        answer = ChatAnswer()
        try:
            for delta, finish_reason in self._iter_deltas(screen):
                if piece := delta.get("reasoning_content") or delta.get("reasoning"):
                    answer.thoughts += piece
                    screen.think(piece)
                if piece := delta.get("content"):
                    answer.content += piece
                    screen.say(piece)
                answer.finish_reason = finish_reason or answer.finish_reason
        finally:
            if answer.content:
                turn.messages.append(answer.to_message())
                turn.is_whole = answer.finish_reason == STOP

    def _iter_deltas(self, screen: ChatScreen) -> Iterator[tuple[Mapping[str, Any], str | None]]:
        """Yield (delta, finish reason); drop the oldest turns if the server refuses the length."""
        while True:
            body = {"model": self.model.name, "messages": self._build_messages(), **self.sampling}
            try:
                for part in self.model.transport.stream(body):
                    for choice in part.get("choices") or []:
                        yield choice.get("delta") or {}, choice.get("finish_reason")
                return
            except RequestRefused:
                if self._first_turn >= len(self.turns) - 1:
                    raise
                self._first_turn += 1
                count = self._first_turn
                dropped = "oldest turn is" if count == 1 else f"{count} oldest turns are"
                screen.note(f"the conversation is longer than the model's context: the {dropped} left out")
