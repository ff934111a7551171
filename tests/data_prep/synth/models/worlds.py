"""A scripted model for the generator `worlds`, and planted worlds."""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.judge import Replies, is_request_to_judge

World = dict[str, Any]


def reply(request: Mapping[str, Any]) -> str:
    """Return the tables or the tools of a sound world."""
    return design_world(request, lambda world: world)


def design_world(request: Mapping[str, Any], plant_fault: Callable[[World], World]) -> str:
    """Return tables or tools of a world with a fault; a request to repair the world changes nothing."""
    messages = request["messages"]
    prompt = messages[-1]["content"]
    if is_request_to_judge(request):
        return json.dumps({"reason": "by rule", "score": 2 if "Shows" in prompt else 9})
    if "You mend" in messages[0]["content"]:
        return prompt.partition("This is a world, as JSON:\n")[2].partition("\n\nIt was tried out")[0]
    design_number = shop_clerk.find_number(prompt, r"design number (\d+)")
    number = shops.TRADES.index(shops.find_trade(prompt)) + 10 * design_number
    world = plant_fault(shops.build_world(number))
    tools = {name: world.pop(name) for name in ("code", "examples")}
    return json.dumps(tools if "Design its tools" in prompt else world)


def make_case(fault: str) -> tuple[GeneratorItem, Replies]:
    """Return an item, and the model that designs a world with a fault of `FAULTS`."""
    item = GeneratorItem("bad-0", {"domain": f"a {shops.TRADES[0].domain}", "number": 0})
    return item, lambda request: design_world(request, lambda world: FAULTS[fault](copy.deepcopy(world)))


def _replace_code(old: str, new: str) -> Callable[[World], World]:
    def replace(world: World) -> World:
        assert old in world["code"], old
        return {**world, "code": world["code"].replace(old, new)}

    return replace


def _remove_last_tools(world: World) -> World:
    return {**world, "code": world["code"][:world["code"].index("def make_")],
            "examples": world["examples"][:-2]}


FAULTS: dict[str, Callable[[World], World]] = {
    "row of another type": _replace_code('"note": None}', '"note": 3}'),
    "argument that nothing uses": _replace_code("title: str)", "title: str, colour: str | None = None)"),
    "fails for arguments that it allows": _replace_code(
        'raise Refused(f"there is no {key[:40]!r} in {table}")', "raise KeyError(key)"),
    "never comes through": _replace_code('if order["status"] != "open":', "if True:"),
    "too few tools": _remove_last_tools,
    "program that may not run": lambda world: {**world, "code": "import os\n" + world["code"]},
    "no tools at all": lambda world: {**world, "code": None},
}
"""Fault -> function that puts it into a sound world."""
