"""A scripted model for the generator `worlds`, and planted worlds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.synth.generator import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.cases import Case

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


def planted(what: str) -> Case:
    """Return a world with a fault of `BENT`."""
    item = GeneratorItem("bad-0", {"domain": f"a {shops.trade(0).domain}", "number": 0})
    return Case(item, _bent(what), False, what)


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
    "argument that nothing uses": _edited(lambda w: w["tools"][1]["parameters"]["properties"].update(
        colour={"type": "string"})),
    "fails for arguments that it allows": _edited(lambda w: (
        w["tools"][MAKE]["parameters"]["properties"].update(until={"type": "string"}),
        _does(w, MAKE)[-1]["return"].update(total="days('2026-01-01', until)"))),
    "never comes through": _edited(lambda w: _does(w, END).insert(1, {
        "require": "which.count > 1000", "else": "no"})),
    "changes nothing": _edited(lambda w: _does(w, END).__setitem__(slice(3, 5), [
        {"update": "orders", "key": "order_id", "set": {"status": "which.status"}}])),
    "two tools alike": _edited(lambda w: w["tools"].append({**w["tools"][1], "name": "look_up"})),
    "too few tools": _edited(lambda w: w.update(tools=w["tools"][:3])),
    "program in an expression": _edited(lambda w: _does(w, 1)[0].update(
        where="__import__('os').system('true') == 0")),
    "no tools at all": _edited(lambda w: w.update(tools=None)),
}
"""Fault -> what makes a sound world have it."""
