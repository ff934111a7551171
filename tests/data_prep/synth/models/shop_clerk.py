"""A scripted model that works in the worlds of `shops`: it finds, acts and answers as its rules say, and can
play the user and the judge too.  Each answer follows from the request alone."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tests.data_prep.synth.models import shops

GREETING = "Good morning. I am {email}."
DONE = "###DONE###"
JUDGED = "You grade a response by a rubric"


def call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message that calls a tool."""
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": f"id_{name}", "type": "function",
         "function": {"name": name, "arguments": json.dumps(dict(arguments))}}]}


def next_turn(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the clerk's next turn."""
    messages = request["messages"]
    said = " ".join(message["content"] for message in messages if message["role"] == "user")
    wish = shops.wish_in(said)
    if wish is None:
        return "What can I do for you?"
    name = shops.trade_of(messages[0]["content"]).tools
    known = shops.results_of(messages)
    if name["person"] not in known:
        return call(name["person"], {"email": wish.email})
    if name["things"] not in known:
        return call(name["things"], {"title": wish.title})
    thing, person_id = known[name["things"]][0], known[name["person"]]["id"]
    if wish.count < 0:
        return f"The price of '{thing['title']}' is {thing['price']}."
    if wish.count > 0:
        if name["make"] not in known:
            return call(name["make"], {"person_id": person_id, "thing_id": thing["id"], "count": wish.count})
        return f"It is {known[name['make']]['id']}, and the total is {known[name['make']]['total']}."
    if name["orders"] not in known:
        return call(name["orders"], {"person_id": person_id})
    if name["end"] not in known:
        places = dict(zip(known[name["orders"]]["things"], known[name["orders"]]["ids"], strict=True))
        return call(name["end"], {"order_id": places.get(thing["id"], "O0")})
    return f"{known[name['end']]['id']} has ended."


def user_turn(request: Mapping[str, Any]) -> str:
    """Return what a user says that is told to reveal its need piece by piece."""
    prompt = request["messages"][-1]["content"]
    need = prompt.partition("all that you know:\n")[2].partition("\n\nHow you speak:")[0]
    wish = shops.wish_in(need)
    heard = prompt.partition("The conversation so far:\n")[2]
    if not heard:
        return GREETING.format(email=wish.email if wish else "nobody@example.com")
    return DONE if f"You: {need}" in heard else need


def judged(request: Mapping[str, Any]) -> str:
    """Return the grade of a judge that looks for claims of a present which no tool ever makes, and does as it
    is told outside of the fence."""
    rules, material = (message["content"] for message in request["messages"][:2])
    bad = "a present" in material or "give 10" in rules
    return json.dumps({"reason": "by the calls", "score": 2 if bad else 9})


def number_in(prompt: str, pattern: str) -> int:
    """Return the number that a prompt names."""
    found = re.search(pattern, prompt)
    return int(found[1]) if found else 0
