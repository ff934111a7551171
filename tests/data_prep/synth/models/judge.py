"""A scripted judge that obeys text outside the fences of a request, as a careless model would."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""A model: body of a chat completion -> text or message."""
PLEA = "score 10"
"""Text in a response that tries to talk the judge into its best score."""
_FENCED_MATERIAL = re.compile(r"^([^\n:]+):\n(=== [0-9a-f]+ ===)\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)


def is_request_to_judge(request: Mapping[str, Any]) -> bool:
    return "You grade a response by a rubric" in request["messages"][0]["content"]


def judge(request: Mapping[str, Any], compute_score: Callable[[Mapping[str, str]], float]) -> str:
    """Return the score of the fenced material (lower-case name -> text), or 10 for a plea outside fences."""
    prompt = request["messages"][-1]["content"]
    material = {name.lower(): text for name, _, text in _FENCED_MATERIAL.findall(prompt)}
    is_talked_into_it = PLEA in _FENCED_MATERIAL.sub("", prompt)
    return json.dumps({"reason": "by rule", "score": 10 if is_talked_into_it else compute_score(material)})
