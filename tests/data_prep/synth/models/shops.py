"""Worlds of one build and many trades, for scripted models: things in stock, people who order them, orders.

Everything follows from the trade and a number, so that a script which is shown a world knows its way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRADES = (("library", "book", "member", "loan"), ("bicycle shop", "bike", "rider", "rental"),
          ("garden centre", "plant", "gardener", "order"), ("hardware store", "tool_kit", "builder", "lease"),
          ("bakery", "cake", "guest", "order"), ("boat harbour", "boat", "sailor", "charter"),
          ("music school", "instrument", "pupil", "loan"), ("ski hut", "sledge", "skier", "rental"),
          ("film club", "film", "viewer", "loan"), ("tea house", "tea", "drinker", "order"))
"""Domain, a thing, a person, an order."""
_FIRST = ("Amber", "Birch", "Cedar", "Dune", "Ember", "Fjord", "Grove", "Heron", "Iris", "Jade")
_LAST = ("Star", "River", "Stone", "Moon", "Field", "Crown", "Wind", "Light")
_PEOPLE = ("mina", "joon", "somchai", "ada", "lena", "omar", "nok", "ivan", "sara", "kofi")
NUM_THINGS, NUM_PEOPLE, NUM_ORDERS = 6, 4, 3


@dataclass(frozen=True)
class Trade:
    """Names of one trade."""

    domain: str
    thing: str
    person: str
    order: str

    @property
    def tools(self) -> dict[str, str]:
        """Return what a tool does -> its name."""
        return {"person": f"find_{self.person}", "things": f"find_{self.thing}s",
                "orders": f"list_{self.order}s", "make": f"make_{self.order}", "end": f"end_{self.order}"}


def trade(number: int) -> Trade:
    """Return a trade by its number, which may be any."""
    return Trade(*TRADES[number % len(TRADES)])


def trade_of(text: str) -> Trade:
    """Return the trade whose domain a text names."""
    return next(Trade(*names) for names in TRADES if names[0] in text)


def state(of: Trade, number: int) -> dict[str, Any]:
    """Return name, rules and tables of a world."""
    things = {f"T{i + 1}": {"title": f"{_FIRST[(number + i) % 10]} {_LAST[(number * 3 + i) % 8]}",
                            "price": 11 + (number * 7 + i * 13) % 60, "stock": (number + i * 2) % 5}
              for i in range(NUM_THINGS)}
    people = {f"P{i + 1}": {"name": _PEOPLE[(number + i) % 10].title(),
                            "email": f"{_PEOPLE[(number + i) % 10]}@example.com", "active": i != 3}
              for i in range(NUM_PEOPLE)}
    orders = {f"O{i + 1}": {"person": f"P{i + 1}", "thing": f"T{(number + i) % NUM_THINGS + 1}",
                            "count": i + 1, "status": "open", "note": None} for i in range(NUM_ORDERS)}
    kinds = {"person": {"type": "string", "references": "people"},
             "thing": {"type": "string", "references": "things"}, "count": {"type": "integer"},
             "status": {"type": "string", "enum": ["open", "ended"]},
             "note": {"type": ["string", "null"], "free": True}}
    return {"name": of.domain.replace(" ", "_"),
            "rules": f"You work in a {of.domain}. Find the {of.person} by e-mail first, and a {of.thing} by "
                     "its title. Do only what is asked for. In the end say what you did, with the total if "
                     "there is one.",
            "tables": {
                "things": {"prefix": "T", "columns": {"title": {"type": "string"}, "price": {
                    "type": "integer"}, "stock": {"type": "integer"}}, "rows": things},
                "people": {"prefix": "P", "columns": {"name": {"type": "string"}, "email": {
                    "type": "string"}, "active": {"type": "boolean"}}, "rows": people},
                "orders": {"prefix": "O", "columns": kinds, "rows": orders}}}


def tools(of: Trade) -> list[dict[str, Any]]:
    """Return the tools of a world, with what they do."""
    name, text, whole = of.tools, {"type": "string"}, {"type": "integer"}
    row = {"type": "object", "properties": {"id": text, "thing": text, "count": whole}}
    return [
        _tool(name["person"], f"Find a {of.person} by e-mail.", {"email": text},
              {"type": "object", "properties": {"id": text, "name": text}},
              [{"get": "people", "where": "row.email == lower(email)", "as": "found",
                "else": f"no {of.person} has this address"},
               {"return": {"id": "found.id", "name": "found.name"}}]),
        _tool(name["things"], f"Find {of.thing}s by a part of the title.", {"title": text},
              {"type": "array", "items": {"type": "object", "properties": {
                  "id": text, "title": text, "price": whole, "stock": whole}}},
              [{"find": "things", "where": "contains(row.title, title)", "as": "found"},
               {"return": "found"}]),
        _tool(name["orders"], f"List the open {of.order}s of a {of.person}.", {"person_id": text},
              {"type": "object", "properties": {"ids": {"type": "array", "items": text}, "things": {
                  "type": "array", "items": text}}},
              [{"get": "people", "key": "person_id", "as": "whose"},
               {"find": "orders", "where": "row.person == whose.id and row.status == 'open'", "as": "found"},
               {"return": {"ids": "found.id", "things": "found.thing"}}]),
        _tool(name["make"], f"Make a {of.order}.", {"person_id": text, "thing_id": text, "count": whole},
              {"type": "object", "properties": {"id": text, "total": whole}},
              [{"get": "people", "key": "person_id", "as": "whose"},
               {"require": "whose.active", "else": "this account is closed"},
               {"get": "things", "key": "thing_id", "as": "what"},
               {"require": "count > 0 and count <= what.stock", "else": "there are not as many"},
               {"update": "things", "key": "thing_id", "set": {"stock": "what.stock - count"}},
               {"insert": "orders", "row": {"person": "person_id", "thing": "thing_id", "count": "count",
                                            "status": "'open'", "note": "null"}, "as": "made"},
               {"return": {"id": "made.id", "total": "what.price * count"}}]),
        _tool(name["end"], f"End an open {of.order}.", {"order_id": text}, row,
              [{"get": "orders", "key": "order_id", "as": "which"},
               {"require": "which.status == 'open'", "else": "it has ended already"},
               {"get": "things", "key": "which.thing", "as": "what"},
               {"update": "things", "key": "which.thing", "set": {"stock": "what.stock + which.count"}},
               {"update": "orders", "key": "order_id", "set": {"status": "'ended'"}},
               {"return": {"id": "order_id", "thing": "what.title", "count": "which.count"}}])]


def _tool(name: str, description: str, parameters: dict[str, Any], returns: dict[str, Any],
          does: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "description": description, "parameters": {
        "type": "object", "properties": parameters, "required": list(parameters)}, "returns": returns,
        "does": does}


def world(number: int) -> dict[str, Any]:
    """Return a whole world."""
    of = trade(number)
    return {**state(of, number), "tools": tools(of)}


@dataclass(frozen=True)
class Wish:
    """What somebody wants."""

    email: str
    title: str
    count: int
    """To order; 0: to end the order that there is; -1: to know the price."""

    def question(self, of: Trade) -> str:
        """Return it in words, from which `wish_in` reads it again."""
        if self.count > 0:
            return (f"I am {self.email}. Please make a {of.order} of {self.count} x '{self.title}'. What "
                    "is the total?")
        if self.count == 0:
            return f"I am {self.email}. Please end my {of.order} of '{self.title}'."
        return f"I am {self.email}. What is the price of '{self.title}'?"


def wish_in(text: str) -> Wish | None:
    """Return the wish that a text tells; None: it tells none, or not all of it."""
    email = re.findall(r"I am (\S+@\S+\.com)", text)
    for count, title in re.findall(r"(?:(\d+) x|price of|of) '([^']+)'", text)[-1:]:
        if email:
            asked = text[:text.rindex(f"'{title}'")].rpartition(".")[2]
            return Wish(email[-1], title, int(count) if count else (-1 if "price" in asked else 0))
    return None


def task(shown: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a task of a world: question, calls, answers.

    Args:
        shown: the world.
        number: of the task; three kinds take turns.
    """
    of, tables = trade_of(shown["rules"]), shown["tables"]
    name, things, people = of.tools, tables["things"]["rows"], tables["people"]["rows"]
    kind = number % 3
    if kind == 1:
        order_id = f"O{number // 3 % NUM_ORDERS + 1}"
        order = tables["orders"]["rows"][order_id]
        wish, person_id, thing_id = Wish(people[order["person"]]["email"], things[order["thing"]]["title"],
                                         0), order["person"], order["thing"]
        calls = [(name["orders"], {"person_id": person_id}), (name["end"], {"order_id": order_id})]
        answers: list[str] = []
    else:
        person_id = f"P{number // 3 % 3 + 1}"
        stocked = [key for key, row in things.items() if row["stock"] >= 1]
        thing_id = stocked[(number // 3) % len(stocked)]
        thing = things[thing_id]
        count = min(2, thing["stock"]) if kind == 0 else -1
        wish = Wish(people[person_id]["email"], thing["title"], count)
        calls = [(name["make"], {"person_id": person_id, "thing_id": thing_id, "count": count})] * (kind == 0)
        answers = [str(thing["price"] * max(1, count))]
    calls = [(name["person"], {"email": wish.email}), (name["things"], {"title": wish.title}), *calls]
    return {"question": wish.question(of), "answers": answers,
            "calls": [{"name": called, "arguments": arguments} for called, arguments in calls]}


def results_of(messages: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return tool -> its last result that is JSON, of a conversation."""
    names, found = {}, {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool":
            try:
                found[names[message["tool_call_id"]]] = json.loads(message["content"])
            except ValueError:  # an error, in words
                continue
    return found
