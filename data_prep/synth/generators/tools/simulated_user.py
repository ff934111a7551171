"""A user that a model plays: it has a need, tells it piece by piece, and knows no tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.synth.generator import Ask
from data_prep.synth.generators.tools.conversation import Message
from megatron_sov.chat.marks import BEGIN_CALL

DONE = "###DONE###"
"""What ends a conversation, as tau-bench's users (arXiv 2406.12045) have a word for it."""
STYLES = (
    "You tell what you want piece by piece: first the matter alone, each detail when you are asked for it.",
    "You begin with something slightly different, and change your mind before it is done: you then say what "
    "you really want.",
    "You ask back once before you agree: what it costs, whether there is a choice, or what happens then.",
    "You are short of words and a little impatient, but you answer what you are asked.",
)
"""How users speak; a conversation has one of them."""
MAX_CHARS = 2000
"""Of a user's turn."""


class SimulatedUser:
    """One user of one conversation."""

    def __init__(self, ask: Ask, need: str, style: str, draw: int, language: str) -> None:
        """Args:
            ask: the door to models.
            need: what the user wants, whole.
            style: one of `STYLES`.
            draw: number of the conversation among those of its item.
            language: that the user speaks.
        """
        self._ask, self._need, self._style, self._draw, self._language = ask, need, style, draw, language
        self.problems: list[str] = []
        """Turns in which the model fell out of its role."""

    def opening(self) -> str:
        """Return what the user says first."""
        return self._said([]) or self._need

    def answer(self, messages: Sequence[Message]) -> str | None:
        """Return what the user says to a conversation so far; None: nothing more."""
        return self._said(messages)

    def _said(self, messages: Sequence[Message]) -> str | None:
        heard: list[dict[str, Any]] = [
            {"who": "You" if message["role"] == "user" else "Assistant", "said": message["content"]}
            for message in messages
            if message["role"] in ("user", "assistant") and message["content"].strip()]
        reply, = self._ask("tool-trajectories/user", first=self._draw, need=self._need, style=self._style,
                           language=self._language, heard=heard, done=DONE, temperature=0.9, max_tokens=512)
        text = reply.text.strip()
        if reply.is_cut or len(text) > MAX_CHARS:
            self.problems.append("a user's turn is too long")
        if BEGIN_CALL in text or text.startswith(("{", "[")):
            self.problems.append("a user writes a tool call, or JSON")
        said = text.partition(DONE)[0].strip()
        return None if DONE in text or not said else said
