"""How an endpoint may fail to answer, what it says of its costs, and whether the model that answers is still
the one whose answers are kept.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard

from megatron_sov.base.errors import UserError

# Whether the model at an address is still the one whose answers are kept: it answers fixed questions, and
# what it says is compared with what it said before.  Names say little: a server that is started again may
# have another model under the same one.
TEXTS = ("The history of the town began when", "To bake bread at home, you need",
         "The three branches of physics are", "After the rain had stopped, the children")
"""By whose likeliest continuations two models hardly ever agree; the first alone was asked once."""
_SHORT: Mapping[str, Any] = {"max_tokens": 32, "temperature": 0}
CHAT_PROBES: Sequence[Mapping[str, Any]] = tuple(
    {"messages": [{"role": "user", "content": f"Go on: {text}"}], **_SHORT} for text in TEXTS)
"""For `/chat/completions`."""
SCORE_PROBES: Sequence[Mapping[str, Any]] = tuple(
    {"messages": [{"role": "user", "content": "Tell me of the town."},
                  {"role": "assistant", "content": text}]} for text in TEXTS)
"""For reward models."""
ASKED_AGAIN = 3
"""How often before a question counts as answered otherwise: in another batch a near tie falls otherwise."""
OTHER_FROM = 0.5
"""Share of the questions from which on another model answers; less is another version of an engine."""
_SAID = ("text", "content", "reasoning_content", "reasoning")
_CLOSE = 0.02
"""Of a score: what another batch or another card may change."""


@dataclass(frozen=True)
class Recognition:
    """How a model is recognised."""

    model: str
    """Its name at the address."""
    probes: Sequence[Mapping[str, Any]]
    way_out: str
    """What a user may do who means another model, or knows that it is the same."""
    same_model: bool = False
    """Whether the user has said that it is the one whose answers are kept."""

    @property
    def questions(self) -> list[dict[str, Any]]:
        return [{"model": self.model, **probe} for probe in self.probes]

    def compared(self, kept: Any, ask: Callable[[Mapping[str, Any]], Any],
                 place: str) -> tuple[list[Any], str]:
        """Return what to keep as its answers, and what a user should know, in a sentence or "".

        Args:
            kept: what it answered before, as this returned it; or one answer, to the first question, as
                earlier versions kept it; None: it was never asked.
            ask: sends a request, and returns its answer.
            place: the address.

        Raises:
            UserError: another model answers.
        """
        before = kept["answers"] if isinstance(kept, dict) and "answers" in kept else [kept]
        before = [] if kept is None else before
        now = [ask(question) for question in self.questions]
        # earlier versions kept one answer: only questions that were asked before are compared
        others = [i for i, (one, other) in enumerate(zip(before, now, strict=False))
                  if not is_same(one, other) and _stays(self.questions[i], one, other, ask)]
        if self.same_model and others:
            return now, ""
        told = f"{len(others)} of {len(before)} fixed questions" if len(before) > 1 else "a fixed question"
        if others and len(others) >= OTHER_FROM * len(before):
            one, other = (_describe_answer(answers[others[0]]) for answers in (before, now))
            raise UserError(f"{place}: answers {told} otherwise than the model {self.model!r} whose answers "
                            f"are kept ({other} now, {one} before). Nothing was removed or asked again: "
                            + self.way_out)
        return before + now[len(before):], (
            f"{place}: answers {told} otherwise than before, as another version of an engine does; it is "
            "taken for the same model, and the cached answers are used" if others else "")


def _stays(question: Mapping[str, Any], one: Any, other: Any,
           ask: Callable[[Mapping[str, Any]], Any]) -> bool:
    """Return whether the other answer comes again each time: one that says something else each time cannot be
    told from others."""
    for _ in range(ASKED_AGAIN):
        again = ask(question)
        if is_same(one, again) or not is_same(other, again):
            return False
    return True


def _describe_answer(answer: Any) -> str:
    name = answer.get("model") if isinstance(answer, dict) else None
    said = repr(next(_texts_of(answer), ""))[:80]
    return f"{said} of {name[:80]!r}" if isinstance(name, str) else said


def answering_model(answer: Any) -> str:
    """Return the name of the model that an endpoint's answer states; empty if it states none."""
    name = answer.get("model") if isinstance(answer, dict) else None
    return name if isinstance(name, str) else ""


def is_same(one: Any, other: Any) -> bool:
    """Return whether two answers to one question say the same and name the same model."""
    # two names are two models; one name proves nothing
    names = [answer.get("model") for answer in (one, other) if isinstance(answer, dict)]
    if len(names) == 2 and all(isinstance(name, str) for name in names) and names[0] != names[1]:
        return False
    ours, theirs = list(_texts_of(one)), list(_texts_of(other))
    return len(ours) == len(theirs) and all(map(_agree, ours, theirs))


def _agree(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return abs(one - other) <= _CLOSE * max(1.0, abs(one), abs(other))


def _texts_of(answer: Any, name: str = "") -> Iterator[str | float]:
    """Yield the texts of an answer's choices, and the numbers of its data."""
    if isinstance(answer, dict):
        for key in sorted(answer):
            if name or key in ("choices", "data"):
                yield from _texts_of(answer[key], key)
    elif isinstance(answer, list):
        for part in answer:
            yield from _texts_of(part, name)
    elif (isinstance(answer, str) and name in _SAID) or (isinstance(answer, float) and name == "data"):
        yield answer


MAX_WAIT_S = 60.0
"""Between two attempts, whatever the endpoint asks for."""
MAX_LEVELS = 200
"""Of an answer's lists and objects: what can be read just so can no longer be written."""
NEVER = {
    "longer than the model's context": ("context_length_exceeded", "maximum context length", "max_model_len",
                                          "maximum model length", "model's context length",
                                          "exceed_context_size"),
    "against the endpoint's policy": ("content_filter", "content_policy_violation"),
}
"""Why a request is refused for good -> words of such a refusal, by OpenAI, vLLM, SGLang and llama.cpp."""
NO_TOOLS = ("--enable-auto-tool-choice", "does not support tools", "requires --jinja")
"""Words of servers that are not set up for calls of tools: vLLM, Ollama, llama.cpp."""
MAX_TOLD_CHARS = 200
"""Of what an endpoint says of a refusal."""


class BadAnswer(Exception):
    """What an endpoint sent is no answer, and may be one at another attempt."""

    def __init__(self, said: str, wait_s: float = 0.0, is_away: bool = False) -> None:
        """Take what is wrong, how long the endpoint asks to be left alone, and whether it is away or full,
        rather than wrong."""
        super().__init__(said)
        self.wait_s, self.is_away = wait_s, is_away


class EndpointUnavailable(BadAnswer):
    """An endpoint has been away, or full, for longer than one is willing to wait."""


class NeverAnswered(BadAnswer):
    """An endpoint refuses this very request, as too long or against its policy: no attempt is answered."""


def decoded(body: bytes) -> Any:
    """Return the JSON of an answer; raises BadAnswer where it is none, or more levels than can be kept."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        looks = "HTML" if body.lstrip()[:1] == b"<" else "no JSON, or a part of it"
        raise BadAnswer(f"the endpoint sent {looks}") from None
    parts = [found]
    # level by level and not by calls: what is nested deep would overflow the stack
    for _ in range(MAX_LEVELS):
        parts = [inner for part in parts if isinstance(part, (dict, list))
                 for inner in (part.values() if isinstance(part, dict) else part)]
        if not parts:
            return found
    raise BadAnswer(f"the endpoint sent JSON of more than {MAX_LEVELS} levels")


def why_never(body: bytes) -> str:
    """Return why the body of a refusal says that its request will never be answered; empty: it does not."""
    text = body[:10_000].decode("utf-8", "replace")
    return next((why for why, words in NEVER.items() if any(word in text for word in words)), "")


def reason_of(body: bytes, secret: str = "") -> str:
    """Return what a refusal says of its reason in OpenAI's form, vLLM's or SGLang's: one line, without the
    key; empty where it says nothing in them."""
    with contextlib.suppress(BadAnswer):
        said = decoded(body)
        said = said.get("error", said) if isinstance(said, dict) else None
        message = said.get("message") if isinstance(said, dict) else said
        if isinstance(message, str):
            # an endpoint's text goes to the terminal, and may quote the key that it was sent
            line = "".join(char if char.isprintable() else " " for char in message)
            return " ".join((line.replace(secret, "...") if secret else line).split())[:MAX_TOLD_CHARS]
    return ""


def seconds(text: str | None) -> float:
    """Return the seconds of a Retry-After header, which may be a date; 0 for nonsense."""
    try:
        wait_s = float(text or 0)
    except ValueError:
        try:
            # a date without a zone is UTC too (RFC 9110, 5.6.7)
            until = parsedate_to_datetime(text or "")
            wait_s = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait_s, 0.0), MAX_WAIT_S) if wait_s == wait_s else 0.0


def told_tokens(answer: Any) -> tuple[int, int] | None:
    """Return the tokens that an answer says were read and written; None where it says nothing sound."""
    said = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(said, dict):
        return None
    read, wrote = said.get("prompt_tokens"), said.get("completion_tokens")
    return (read, wrote) if _is_count(read) and _is_count(wrote) else None


def _is_count(said: Any) -> TypeGuard[int]:
    return isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 10**9


def only(answer: Any, name: str) -> dict[str, Any]:
    """Return the only item of a list in an answer; raises BadAnswer where it is not the only one."""
    items = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], dict):
        raise BadAnswer(f"the endpoint's answer must have one of {name!r}, for one was asked for")
    return items[0]
