"""How an endpoint may fail to answer, and what it says of its costs and its model."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard

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


def answering_model(answer: Any) -> str:
    """Return the name of the model that an endpoint's answer states; empty if it states none."""
    name = answer.get("model") if isinstance(answer, dict) else None
    return name if isinstance(name, str) else ""


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
