"""Worlds for scripted models: shops with a stock, customers and orders. Each follows from its trade and
number, so a scripted model can act in a world that it reads in a prompt."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FIRST = ("Amber", "Birch", "Cedar", "Dune", "Ember", "Fjord", "Grove", "Heron", "Iris", "Jade")
_LAST = ("Star", "River", "Stone", "Moon", "Field", "Crown", "Wind", "Light")
_PEOPLE = ("mina", "joon", "somchai", "ada", "lena", "omar", "nok", "ivan", "sara", "kofi")
NUM_THINGS, NUM_PEOPLE, NUM_ORDERS = 6, 4, 3


@dataclass(frozen=True)
class Trade:
    """Nouns of one trade, from which the names of its tools follow."""

    domain: str
    thing: str
    person: str
    order: str

    @property
    def tools(self) -> dict[str, str]:
        """Map an action to the name of its tool."""
        return {"person": f"find_{self.person}", "things": f"find_{self.thing}s",
                "orders": f"list_{self.order}s", "make": f"make_{self.order}", "end": f"end_{self.order}"}


TRADES = (Trade("library", "book", "member", "loan"), Trade("bakery", "cake", "guest", "order"))


def find_trade(text: str) -> Trade:
    """Return the trade whose domain occurs in a text."""
    return next(trade for trade in TRADES if trade.domain in text)


def build_tables(trade: Trade, number: int) -> dict[str, Any]:
    """Return name, rules and tables of a world."""
    things = {f"T{i + 1}": {"title": f"{_FIRST[(number + i) % 10]} {_LAST[(number * 3 + i) % 8]}",
                            "price": 11 + (number * 7 + i * 13) % 60, "stock": (number + i * 2) % 5}
              for i in range(NUM_THINGS)}
    people = {f"P{i + 1}": {"name": _PEOPLE[(number + i) % 10].title(),
                            "email": f"{_PEOPLE[(number + i) % 10]}@example.com", "active": i != 3}
              for i in range(NUM_PEOPLE)}
    orders = {f"O{i + 1}": {"person": f"P{i + 1}", "thing": f"T{(number + i) % NUM_THINGS + 1}",
                            "count": i + 1, "status": "open", "note": None} for i in range(NUM_ORDERS)}
    kinds = {"person": "str", "thing": "str", "count": "int", "status": "Literal['open', 'ended']",
             "note": "str | None"}
    return {"name": trade.domain.replace(" ", "_"),
            "rules": f"You work in a {trade.domain}. Find the {trade.person} by e-mail first, and a "
                     f"{trade.thing} by its title. Do only what is asked for. In the end say what you did, "
                     "with the total if there is one.",
            "tables": {
                "things": {"columns": {"title": "str", "price": "int", "stock": "int"}, "rows": things},
                "people": {"columns": {"name": "str", "email": "str", "active": "bool"}, "rows": people},
                "orders": {"columns": kinds, "free": ["note"], "rows": orders}}}


CODE = '''
def _row(tables, table, key):
    if key not in tables[table]:
        raise Refused(f"there is no {key[:40]!r} in {table}")
    return tables[table][key]


def find_PERSON(tables, email: str):
    """Find a PERSON by e-mail."""
    for key, person in tables["people"].items():
        if person["email"] == email.lower():
            return {"id": key, "name": person["name"]}
    raise Refused("no PERSON has this address")


def find_THINGs(tables, title: str):
    """Find THINGs by a part of the title."""
    return [{"id": key, **thing} for key, thing in sorted(tables["things"].items())
            if title.lower() in thing["title"].lower()]


def list_ORDERs(tables, person_id: str):
    """List the open ORDERs of a PERSON."""
    _row(tables, "people", person_id)
    found = {key: order["thing"] for key, order in sorted(tables["orders"].items())
             if order["person"] == person_id and order["status"] == "open"}
    return {"ids": list(found), "things": list(found.values())}


def make_ORDER(tables, person_id: str, thing_id: str, count: int):
    """Make a ORDER."""
    if not _row(tables, "people", person_id)["active"]:
        raise Refused("this account is closed")
    thing = _row(tables, "things", thing_id)
    if not 0 < count <= thing["stock"]:
        raise Refused("there are not as many")
    thing["stock"] -= count
    key = f"O{len(tables['orders']) + 1}"
    tables["orders"][key] = {"person": person_id, "thing": thing_id, "count": count, "status": "open",
                             "note": None}
    return {"id": key, "total": thing["price"] * count}


def end_ORDER(tables, order_id: str):
    """End an open ORDER."""
    order = _row(tables, "orders", order_id)
    if order["status"] != "open":
        raise Refused("it has ended already")
    thing = _row(tables, "things", order["thing"])
    thing["stock"] += order["count"]
    order["status"] = "ended"
    return {"id": order_id, "thing": thing["title"], "count": order["count"]}
'''


def write_code(trade: Trade) -> str:
    """Return the source of a world's tools."""
    return CODE.replace("PERSON", trade.person).replace("THING", trade.thing).replace("ORDER", trade.order)


def build_examples(trade: Trade, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a call of each tool that succeeds on the first tables."""
    name, things = trade.tools, tables["things"]["rows"]
    stocked = next(key for key, row in things.items() if row["stock"])
    calls = {"person": {"email": tables["people"]["rows"]["P1"]["email"]}, "orders": {"person_id": "P1"},
             "things": {"title": things["T1"]["title"]}, "end": {"order_id": "O1"},
             "make": {"person_id": "P1", "thing_id": stocked, "count": 1}}
    return [{"name": name[tool], "arguments": arguments} for tool, arguments in calls.items()]


def build_world(number: int) -> dict[str, Any]:
    """Return a complete world; its number is the index of a trade plus 10 times a design number."""
    trade = TRADES[number % 10]
    tables = build_tables(trade, number)
    examples = build_examples(trade, tables["tables"])
    return {**tables, "code": write_code(trade), "examples": examples}


@dataclass(frozen=True)
class Wish:
    """An order, the end of an order, or a question about a price."""

    email: str
    title: str
    count: int
    """Things to order; 0: end the existing order; -1: state the price."""

    def write_question(self, trade: Trade) -> str:
        """Return a text that `parse_wish` reads back."""
        if self.count > 0:
            return (f"I am {self.email}. Please make a {trade.order} of {self.count} x '{self.title}'. What "
                    "is the total?")
        if self.count == 0:
            return f"I am {self.email}. Please end my {trade.order} of '{self.title}'."
        return f"I am {self.email}. What is the price of '{self.title}'?"


def parse_wish(text: str) -> Wish | None:
    """Return the wish in a text; None if the text has no complete wish."""
    email = re.findall(r"I am (\S+@\S+\.com)", text)
    for count, title in re.findall(r"(?:(\d+) x|price of|of) '([^']+)'", text)[-1:]:
        if email:
            sentence = text[:text.rindex(f"'{title}'")].rpartition(".")[2]
            if count:
                return Wish(email[-1], title, int(count))
            return Wish(email[-1], title, -1 if "price" in sentence else 0)
    return None


def build_task(world: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a task in a world: question, calls, answers.

    Args:
        world: returned by `build_world`.
        number: modulo 3 it is the kind of task: 0: order, 1: end an order, 2: ask for a price.
    """
    trade, tables = find_trade(world["rules"]), world["tables"]
    name, things, people = trade.tools, tables["things"]["rows"], tables["people"]["rows"]
    kind = number % 3
    if kind == 1:
        order_id = f"O{number // 3 % NUM_ORDERS + 1}"
        order = tables["orders"]["rows"][order_id]
        wish = Wish(people[order["person"]]["email"], things[order["thing"]]["title"], count=0)
        calls = [(name["orders"], {"person_id": order["person"]}), (name["end"], {"order_id": order_id})]
        answers: list[str] = []
    else:
        person_id = f"P{number // 3 % 3 + 1}"
        stocked = [key for key, row in things.items() if row["stock"] >= 1]
        thing_id = stocked[(number // 3) % len(stocked)]
        thing = things[thing_id]
        count = min(2, thing["stock"]) if kind == 0 else -1
        wish = Wish(people[person_id]["email"], thing["title"], count)
        calls = []
        if kind == 0:
            calls = [(name["make"], {"person_id": person_id, "thing_id": thing_id, "count": count})]
        answers = [str(thing["price"] * max(1, count))]
    calls = [(name["person"], {"email": wish.email}), (name["things"], {"title": wish.title}), *calls]
    return {"question": wish.write_question(trade), "answers": answers,
            "calls": [{"name": called, "arguments": arguments} for called, arguments in calls]}


def read_results(messages: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Map each tool to its last result in JSON in a conversation."""
    names, results = {}, {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool":
            try:
                results[names[message["tool_call_id"]]] = json.loads(message["content"])
            except ValueError:  # an error message
                continue
    return results
