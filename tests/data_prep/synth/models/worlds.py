"""A scripted model for the generator `worlds`, and planted worlds."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.cases import Case

World = dict[str, Any]


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
    tools = {name: world.pop(name) for name in ("code", "examples")}
    return json.dumps(tools if "Design its tools" in prompt else world)


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


def _replaced(old: str, new: str) -> Callable[[World], World]:
    def replaced(world: World) -> World:
        assert old in world["code"], old
        return {**world, "code": world["code"].replace(old, new)}

    return replaced


def _with_copy(world: World) -> World:
    """Add a tool with the code of another one."""
    [code] = re.findall(r"def find_\w+s\(.*?(?=\n\n\ndef )", world["code"], flags=re.DOTALL)
    code = re.sub(r"find_\w+s", "look_up", code, count=1)
    return {**world, "code": f"{world['code']}\n\n{code}\n",
            "examples": [*world["examples"], {"name": "look_up", "arguments": {"title": "a"}}]}


def _without_last_tools(world: World) -> World:
    return {**world, "code": world["code"][:world["code"].index("def make_")],
            "examples": world["examples"][:-2]}


BENT: dict[str, Callable[[World], World]] = {
    "row of another type": _replaced('"note": None}', '"note": 3}'),
    "argument that nothing uses": _replaced("title: str)", "title: str, colour: str | None = None)"),
    "fails for arguments that it allows": _replaced(
        'raise Refused(f"there is no {key[:40]!r} in {table}")', "raise KeyError(key)"),
    "never comes through": _replaced('if order["status"] != "open":', "if True:"),
    "differs from call to call": _replaced(
        '"name": person["name"]}', '"name": str(__import__("random").random())}'),
    "two tools alike": _with_copy,
    "too few tools": _without_last_tools,
    "program that may not run": lambda world: {**world, "code": "import os\n" + world["code"]},
    "no tools at all": _edited(lambda w: w.update(code=None)),
}
"""Fault -> what makes a sound world have it."""
