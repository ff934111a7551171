"""The door to models: what a generator asks becomes chat completions, each with a seed of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from data_prep.synth.generator import MAX_ATTEMPTS, NoReply, NoUsableReply, Reply, Role
from data_prep.synth.replies import fault_of, read_reply
from data_prep.synth.templates import Prompt
from megatron_sov.endpoints.answers import BadAnswer, NeverAnswered, Unavailable
from megatron_sov.rewards.fenced import fenced_messages, grade_in, sound

T = TypeVar("T")
Drawn = Reply | NoUsableReply
"""What comes of one draw."""
JUDGE_MAX_TOKENS = 1024
"""Of a judge's answer, unless told."""
JUDGE_RETRY_TEMPERATURE = 0.5
"""The likeliest answer stays what it is; another one is wanted."""


class Door(Protocol):
    """One model behind an endpoint, or behind a test's."""

    @property
    def model(self) -> str:
        """Return the model's name, as the endpoint calls it."""
        ...

    def key(self, payload: Mapping[str, Any]) -> str:
        """Return the hash of a request."""
        ...

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the answer; raises as `Endpoint.ask` does."""
        ...


class Asking:
    """Asks for one item.

    Args:
        item_id: of the item; part of every seed.
        prompts: templates by name.
        doors: role -> model.
        over: maps a function over draws; a run gives one that asks several at a time.
        judge_max_tokens: of a judge's answer.
    """

    def __init__(self, item_id: str, prompts: Mapping[str, Prompt], doors: Mapping[Role, Door],
                 over: Callable[[Callable[[int], Drawn], Iterable[int]], Iterator[Drawn]] = map,
                 judge_max_tokens: int = JUDGE_MAX_TOKENS) -> None:
        self._judge_max_tokens = judge_max_tokens
        self._item_id, self._prompts, self._doors, self._over = item_id, prompts, doors, over
        self.asked: dict[str, None] = {}
        """Keys of all answers that were used, in the order in which they were."""
        self.failure: Exception | None = None
        """What kept a question from being answered; its item is not done, whatever is made of it."""

    def __call__(self, template: str, /, *, count: int = 1, first: int = 0, role: Role = "writer",
                 temperature: float = 0.7, top_p: float = 1.0, max_tokens: int = 1024,
                 thinking: bool | None = None, attempts: int = MAX_ATTEMPTS, **fields: Any) -> list[Reply]:
        """Return the answers of use of `count` draws; see `Ask`."""
        messages = self._prompts[template].messages(fields)
        request = _request(messages, temperature, top_p, max_tokens, thinking)

        def drawn(draw: int) -> Drawn:
            try:
                return self._reply(role, request, template, draw, attempts)
            except NoUsableReply as e:  # one draw, not the others of its question
                return e

        found = list(self._over(drawn, range(first, first + count)))
        replies = [one for one in found if isinstance(one, Reply)]
        if not replies and found and isinstance(found[-1], NoUsableReply):
            raise found[-1]
        self.asked |= dict.fromkeys(reply.key for reply in replies)
        return replies

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
             role: Role = "writer", draw: int = 0, temperature: float = 0.7, top_p: float = 1.0,
             max_tokens: int = 1024, thinking: bool | None = None) -> Reply:
        """Return the next message of a conversation; see `Ask`."""
        request = _request(messages, temperature, top_p, max_tokens, thinking)
        if tools:
            request["tools"] = [dict(tool) for tool in tools]
        reply = self._reply(role, request, "", draw, MAX_ATTEMPTS)
        self.asked[reply.key] = None
        return reply

    def judge(self, rubric: str, material: Mapping[str, str], *, low: float = 0.0,
              high: float = 10.0) -> float:
        """Return the judge's score; see `Ask`.  An answer without a sound score is none, and not 0: another
        one is asked for."""
        door = self._doors["judge"]
        messages = fenced_messages(door.model, sound(rubric),
                                   {name: sound(text) for name, text in material.items()}, low, high)
        num_cut = 0
        for attempt in range(MAX_ATTEMPTS):
            request = _request(messages, JUDGE_RETRY_TEMPERATURE if attempt else 0.0, 1.0,
                               self._judge_max_tokens, None)
            reply = self._one("judge", request, "", 0, attempt)
            num_cut += reply.is_cut
            if not reply.is_cut:
                try:
                    score, _ = grade_in(reply.text, low, high)
                except BadAnswer:
                    continue
                self.asked[reply.key] = None
                return score
        cut = (f", {num_cut} of them cut off at {self._judge_max_tokens:,} tokens; raise --judge-max-tokens, "
               "or take a judge that does not think first" if num_cut else "")
        raise NoUsableReply(f"the judge gave no score in {MAX_ATTEMPTS} answers{cut}")

    def _reply(self, role: Role, request: Mapping[str, Any], template: str, draw: int,
               attempts: int) -> Reply:
        """Return the first answer that is of use."""
        fault = ""
        for attempt in range(attempts):
            reply = self._one(role, request, template, draw, attempt)
            if not (fault := fault_of(reply)):
                return reply
        raise NoUsableReply(f"{attempts} answers were of no use, the last: {fault}")

    def _one(self, role: Role, request: Mapping[str, Any], template: str, draw: int, attempt: int) -> Reply:
        door = self._doors[role]
        payload = {"model": door.model, **request,
                   "seed": _seed(self._item_id, template, draw, attempt)}
        key = door.key(payload)
        try:
            return door.ask(payload, lambda raw: read_reply(raw, key, "tools" in request))
        except NeverAnswered as e:
            raise NoUsableReply(str(e)) from None
        except Exception as e:
            is_wanting = isinstance(e, (BadAnswer, TimeoutError)) and not isinstance(e, Unavailable)
            self.failure = NoReply(str(e)) if is_wanting else e
            raise self.failure from None


def _request(messages: Sequence[Mapping[str, Any]], temperature: float, top_p: float, max_tokens: int,
             thinking: bool | None) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": _sound([dict(message) for message in messages]),
                               "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    if thinking is not None:  # as vLLM, SGLang and ours take it
        request["chat_template_kwargs"] = {"enable_thinking": thinking}
    return request


def _sound(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as UTF-8 can hold them: half of a surrogate pair becomes a question mark."""
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        found: list[dict[str, Any]] = json.loads(sound(text))
        return found
    return messages


def _seed(*parts: object) -> int:
    """Return a seed from 0 to 2**31 - 1 that follows from what is asked."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
