"""Planted cases: items with models that answer well or badly, for the benchmark of checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.synth.generator import GeneratorItem

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""Takes a chat-completions body, gives a text or a message."""


@dataclass(frozen=True)
class Case:
    """One item and a model's answers about it; it counts as kept where one sample of it passes all checks."""

    item: GeneratorItem
    """What the generator starts from."""
    replies: Replies
    """The model."""
    good: bool
    """Whether a sample ought to be kept."""
    what: str
    """What is wrong, or why it is good."""


def asked(request: Mapping[str, Any]) -> tuple[str, str]:
    """Return the system's and the last user's text of a request."""
    texts = {message["role"]: str(message["content"]) for message in request["messages"]}
    return texts.get("system", ""), texts.get("user", "")


def is_judge(request: Mapping[str, Any]) -> bool:
    """Return whether a grade is asked for."""
    return "You grade a response by a rubric" in asked(request)[0]
