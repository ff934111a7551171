"""Chats with media, and the type of the `encode` fixture."""

from collections.abc import Callable
from typing import Any

Encode = Callable[..., int]


def build_media_chat(*parts: tuple[str, str], answer: Any = "Yes.") -> dict[str, Any]:
    """Return a chat of one user message with `parts`, (kind, path) or ("text", text), and an answer."""
    content = [{"type": kind, ("text" if kind == "text" else "path"): value} for kind, value in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
