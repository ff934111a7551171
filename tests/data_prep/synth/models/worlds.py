"""A scripted model for the generator `worlds`, and planted worlds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.synth.generator import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.cases import Case

SETTINGS: dict[str, Any] = {}
NUM_DOMAINS = 6
"""Of a run."""
World = dict[str, Any]
MAKE, END = 3, 4
"""Places of the tools that change something."""


def reply(request: Mapping[str, Any]) -> str:
    """Return the tables or the tools of a sound world."""
    return answer(request, lambda world: world)


def answer(request: Mapping[str, Any], bent: Callable[[World], World]) -> str:
    """Return what is asked for of a world that something was done to; it is not mended."""
    messages = request["messages"]
    prompt = messages[-1]["content"]
    if messages[0]["content"].startswith(shop_clerk.JUDGED):
        return json.dumps({"reason": "as it says", "score": 2 if "Shows" in prompt else 9})
    if "You mend" in messages[0]["content"]:
        return prompt.partition("This is a world, as JSON:\n")[2].partition("\n\nIt was tried out")[0]
    of = shops.trade_of(prompt)
    number = shops.TRADES.index((of.domain, of.thing, of.person, of.order))
    number += 10 * shop_clerk.number_in(prompt, r"design number (\d+)")
    world = bent(shops.world(number))
    tools = world.pop("tools")
    return json.dumps({"tools": tools} if "Design its tools" in prompt else world)


def arguments(folder: Path) -> list[str]:
    """Write domains; returns the words of a run over them."""
    file = folder / "domains.jsonl"
    file.write_text("".join(json.dumps({"domain": f"a {shops.trade(number).domain}"}) + "\n"
                            for number in range(NUM_DOMAINS)), encoding="utf-8")
    return ["--input", str(file)]


def cases() -> list[Case]:
    """Return 50 sound worlds and 50 of `BENT`, each fault several times."""
    found = []
    for number in range(50):
        of = shops.trade(number)
        item = GeneratorItem(f"good-{number}", {"domain": f"a {of.domain}", "number": number // 10})
        found.append(Case(item, reply, True, "sound"))
        what = list(BENT)[number % len(BENT)]
        item = GeneratorItem(f"bad-{number}", {"domain": f"a {of.domain}", "number": number // 10})
        found.append(Case(item, _bent(what), False, what))
    return found


def _bent(what: str) -> Callable[[Mapping[str, Any]], str]:
    def bent(world: World) -> World:
        return BENT[what](copy.deepcopy(world))

    return lambda request: answer(request, bent)


def _edited(edit: Callable[[World], object]) -> Callable[[World], World]:
    def edited(world: World) -> World:
        edit(world)
        return world

    return edited


def _does(world: World, place: int) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = world["tools"][place]["does"]
    return steps


BENT: dict[str, Callable[[World], World]] = {
    "result of another type": _edited(lambda w: w["tools"][MAKE]["returns"]["properties"].update(
        total={"type": "string"})),
    "result lacks a property": _edited(lambda w: w["tools"][0]["returns"]["properties"].update(
        email={"type": "string"})),
    "argument that nothing uses": _edited(lambda w: w["tools"][1]["parameters"]["properties"].update(
        colour={"type": "string"})),
    "fails for arguments that it allows": _edited(lambda w: (
        w["tools"][MAKE]["parameters"]["properties"].update(until={"type": "string"}),
        _does(w, MAKE)[-1]["return"].update(total="days('2026-01-01', until)"))),
    "divides by an argument": _edited(lambda w: _does(w, 1).insert(0, {
        "let": "half", "be": "100 // length(title)"})),
    "optional argument is not handled": _edited(
        lambda w: w["tools"][1]["parameters"].update(required=[])),
    "never comes through": _edited(lambda w: _does(w, END).insert(1, {
        "require": "which.count > 1000", "else": "no"})),
    "changes nothing": _edited(lambda w: _does(w, END).__setitem__(slice(3, 5), [
        {"update": "orders", "key": "order_id", "set": {"status": "which.status"}}])),
    "row of another table": _edited(lambda w: _does(w, MAKE)[5]["row"].update(thing="person_id")),
    "leaves a number that is no whole one": _edited(lambda w: _does(w, MAKE)[4]["set"].update(
        stock="what.stock - count / 2")),
    "deletes what others refer to": _edited(lambda w: _does(w, END).insert(
        4, {"delete": "things", "key": "which.thing"})),
    "two tools alike": _edited(lambda w: w["tools"].append({**w["tools"][1], "name": "look_up"})),
    "too few tools": _edited(lambda w: w.update(tools=w["tools"][:3])),
    "text without quotes": _edited(lambda w: _does(w, END)[4]["set"].update(status="ended")),
    "unknown table": _edited(lambda w: _does(w, 1)[0].update(find="wares")),
    "rows that lack a column": _edited(lambda w: w["tables"]["things"]["rows"]["T2"].pop("price")),
    "a key that is nobody's": _edited(lambda w: w["tables"]["orders"]["rows"]["O1"].update(person="P9")),
    "program in an expression": _edited(lambda w: _does(w, 1)[0].update(
        where="__import__('os').system('true') == 0")),
    "a bomb": _edited(lambda w: _does(w, 1).insert(0, {"let": "big", "be": "title" + " + title" * 90})),
    "a schema keyword that nothing holds to": _edited(
        lambda w: w["tools"][MAKE]["parameters"]["properties"]["count"].update(minimum=1)),
    "no tools at all": _edited(lambda w: w.update(tools=None)),
    "no return": _edited(lambda w: _does(w, 0).pop()),
}
"""Fault -> what makes a sound world have it."""
