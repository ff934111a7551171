"""What a response answers: a prompt's text, or its messages."""

from __future__ import annotations

from megatron_sov.rewards.reward import Row, text_of


def messages_of(row: Row) -> list[dict[str, str]]:
    """Return a row's `prompt` as messages with role and content.

    Raises:
        Refused: it has none.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return [{"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt]
    return [{"role": "user", "content": text_of(row, "prompt")}]


def told(row: Row) -> str:
    """Return a row's `prompt` as one text: as it is, or its messages with their roles; raises as
    `messages_of` does."""
    if isinstance(row.get("prompt"), str):
        return text_of(row, "prompt")
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages_of(row))
