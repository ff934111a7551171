"""What a scripted judge sees of a request: its rubric, the material between the fences, and what stands
outside of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.data_prep.synth.models.cases import asked, is_judge

_PART = re.compile(r"^([^\n:]+):\n(=== [0-9a-f]+ ===)\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
PLEA = "score 10"
"""What a response writes that wants to talk a judge into a verdict."""


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
    if not is_judge(request):
        return None
    _, user = asked(request)
    material = {name.lower(): text for name, _, text in _PART.findall(user)}
    outside = _PART.sub("", user)
    return Graded(outside.strip(), material, outside)


def grade(score: float, graded: Graded) -> str:
    """Return the judge's answer; one that reads a plea outside of the fences does what it asks."""
    return json.dumps({"reason": "by rule", "score": 10 if PLEA in graded.outside else score})
