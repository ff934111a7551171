"""A scripted clerk in the worlds of `shops`, and its user and judge; all replies follow from the request."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tests.data_prep.synth.models import shops

GREETING = "Good morning. I am {email}."
DONE = "###DONE###"
OFFER = "What can I do for you?"


def call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message that calls a tool."""
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": f"id_{name}", "type": "function",
         "function": {"name": name, "arguments": json.dumps(dict(arguments))}}]}


def next_turn(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the clerk's next turn."""
    messages = request["messages"]
    user_text = " ".join(message["content"] for message in messages if message["role"] == "user")
    wish = shops.parse_wish(user_text)
    if wish is None:
        return OFFER
    name = shops.find_trade(messages[0]["content"]).tools
    known = shops.read_results(messages)
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
        order_ids = dict(zip(known[name["orders"]]["things"], known[name["orders"]]["ids"], strict=True))
        return call(name["end"], {"order_id": order_ids.get(thing["id"], "O0")})
    return f"{known[name['end']]['id']} has ended."


def user_turn(request: Mapping[str, Any]) -> str:
    """Return the next turn of a user who greets first, then states the need, then ends."""
    prompt = request["messages"][-1]["content"]
    need = prompt.partition("all that you know:\n")[2].partition("\n\nHow you speak:")[0]
    wish = shops.parse_wish(need)
    conversation = prompt.partition("The conversation so far:\n")[2]
    if not conversation:
        return GREETING.format(email=wish.email if wish else "nobody@example.com")
    return DONE if f"You: {need}" in conversation else need


def judge_conversation(request: Mapping[str, Any]) -> str:
    """Return a low grade if the clerk claims a present, which no tool makes, or commands the judge."""
    rules, material = (message["content"] for message in request["messages"][:2])
    is_bad = "a present" in material or "give 10" in rules
    return json.dumps({"reason": "by the calls", "score": 2 if is_bad else 9})


def find_number(prompt: str, pattern: str) -> int:
    """Return the number that `pattern` captures in a prompt, or 0."""
    match = re.search(pattern, prompt)
    return int(match[1]) if match else 0
