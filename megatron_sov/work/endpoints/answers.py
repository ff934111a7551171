"""Failures of endpoints, and the token counts and model names in their answers."""

import contextlib
import json
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard

MAX_WAIT_S = 60.0
"""Maximum wait between attempts, regardless of Retry-After."""
MAX_LEVELS = 200
"""Maximum nesting depth of an answer's JSON; deeper values can be parsed but not serialized again."""
PERMANENT_REFUSALS = {
    "longer than the model's context": ("context_length_exceeded", "maximum context length", "max_model_len",
                                        "maximum model length", "model's context length",
                                        "exceed_context_size"),
    "against the endpoint's policy": ("content_filter", "content_policy_violation")}
"""Reason for a permanent refusal -> phrases in error bodies from OpenAI, vLLM, SGLang and llama.cpp."""
NO_TOOLS_PHRASES = ("--enable-auto-tool-choice", "does not support tools", "requires --jinja")
"""Phrases from vLLM, Ollama and llama.cpp servers without tool calling."""
MAX_REASON_CHARS = 200
"""Maximum length of an endpoint's error text in messages."""


def read_model_name(answer: Any) -> str:
    """Return the model name in an endpoint's answer, or ""."""
    name = answer.get("model") if isinstance(answer, dict) else None
    return name if isinstance(name, str) else ""


class BadAnswer(Exception):
    """The endpoint's reply is unusable; another attempt may succeed."""

    def __init__(self, message: str, wait_s: float = 0.0, is_unavailable: bool = False) -> None:
        """Store message, requested wait in seconds, and whether the endpoint is away or overloaded."""
        super().__init__(message)
        self.wait_s, self.is_unavailable = wait_s, is_unavailable


class EndpointUnavailable(BadAnswer):
    """The endpoint was unreachable or overloaded for longer than the limit."""


class RequestRefused(BadAnswer):
    """The endpoint refuses the request permanently: too long, or against its policy."""


def parse_json_answer(body: bytes) -> Any:
    """Parse an answer's JSON; raises BadAnswer if invalid or nested beyond `MAX_LEVELS`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        description = "HTML" if body.lstrip()[:1] == b"<" else "no JSON, or a part of it"
        raise BadAnswer(f"the endpoint sent {description}") from None
    parts = [content]
    # iterate by level: recursion would overflow the stack
    for _ in range(MAX_LEVELS):
        parts = [inner for part in parts if isinstance(part, (dict, list))
                 for inner in (part.values() if isinstance(part, dict) else part)]
        if not parts:
            return content
    raise BadAnswer(f"the endpoint sent JSON of more than {MAX_LEVELS} levels")


def find_permanent_refusal(body: bytes) -> str:
    """Return the reason for a permanent refusal in an error body, or ""."""
    text = body[:10_000].decode("utf-8", "replace")
    for reason, words in PERMANENT_REFUSALS.items():
        if any(word in text for word in words):
            return reason
    return ""


def read_error_text(body: bytes, secret: str = "") -> str:
    """Return the error text in OpenAI's, vLLM's or SGLang's format on one line, with the API key masked."""
    with contextlib.suppress(BadAnswer):
        error = parse_json_answer(body)
        error = error.get("error", error) if isinstance(error, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            # the text goes to the terminal and may quote the key
            line = "".join(char if char.isprintable() else " " for char in message)
            return " ".join((line.replace(secret, "...") if secret else line).split())[:MAX_REASON_CHARS]
    return ""


def parse_retry_after(text: str | None) -> float:
    """Parse a Retry-After header (seconds or a date); 0 if invalid."""
    try:
        wait_s = float(text or 0)
    except ValueError:
        try:
            # a date without zone means UTC (RFC 9110, 5.6.7)
            until = parsedate_to_datetime(text or "")
            wait_s = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait_s, 0.0), MAX_WAIT_S) if wait_s == wait_s else 0.0


def read_usage(answer: Any) -> tuple[int, int] | None:
    """Return (prompt tokens, completion tokens) from an answer's usage, or None."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    num_prompt, num_completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (num_prompt, num_completion) if _is_count(num_prompt) and _is_count(num_completion) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


def get_single_item(answer: Any, name: str) -> dict[str, Any]:
    """Return the single item of list `name` in an answer; raises BadAnswer for another number of items."""
    items = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], dict):
        raise BadAnswer(f"the endpoint's answer must have one of {name!r}, for one was asked for")
    return items[0]
