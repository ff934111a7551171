"""Planted cases: items with models that answer well or badly, and what a scripted judge sees of a request."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.synth.samples import GeneratorItem

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""Takes a chat-completions body, gives a text or a message."""
_PART = re.compile(r"^([^\n:]+):\n(=== [0-9a-f]+ ===)\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
PLEA = "score 10"
"""What a response writes that wants to talk a judge into a verdict."""


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


@dataclass(frozen=True)
class Graded:
    """A request for a grade."""

    rubric: str
    """What is asked."""
    material: Mapping[str, str]
    """Name, in small letters -> text."""
    outside: str
    """Everything that is not material: a judge obeys it."""


def graded_in(request: Mapping[str, Any]) -> Graded | None:
    """Return what is to be graded; None: the request is no judge's."""
    system, user = asked(request)
    if "You grade a response by a rubric" not in system:
        return None
    material = {name.lower(): text for name, _, text in _PART.findall(user)}
    outside = _PART.sub("", user)
    return Graded(outside.strip(), material, outside)


def grade(score: float, graded: Graded) -> str:
    """Return the judge's answer; one that reads a plea outside of the fences does what it asks."""
    return json.dumps({"reason": "by rule", "score": 10 if PLEA in graded.outside else score})
