"""A scripted model for the generator `goals`, and planted tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.synth.generator import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.cases import Case

Draft = dict[str, Any]
SETTINGS: dict[str, Any] = {"tasks_per_world": 1}
NUM_WORLDS = 4
"""Of a run."""


def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return a sound task, or the next turn of a solver."""
    return answer(request, lambda draft: draft)


def answer(request: Mapping[str, Any], bent: Callable[[Draft], Draft | str],
           offset: int = 0) -> str | dict[str, Any]:
    """Return a task that something was done to, or the next turn of a solver.

    Args:
        request: as a model gets it.
        bent: what is done to tasks.
        offset: is added to their numbers.
    """
    if "tools" in request:
        return shop_clerk.next_turn(request)
    prompt = request["messages"][-1]["content"]
    world = json.loads(prompt.partition("what they do.\n")[2].partition("\n\nWrite task")[0])
    number = shop_clerk.number_in(prompt, r"Write task number (\d+)") - 1
    made = bent(copy.deepcopy(shops.task(world, number + offset)))
    return made if isinstance(made, str) else json.dumps(made)


def arguments(folder: Path) -> list[str]:
    """Write worlds; returns the words of a run over them."""
    file = folder / "worlds.jsonl"
    file.write_text("".join(json.dumps({"domain": shops.trade(number).domain, "world": shops.world(number)})
                            + "\n" for number in range(NUM_WORLDS)), encoding="utf-8")
    return ["--input", str(file), "--set", "tasks_per_world=2", "--set", "num_solvers=1"]


def cases() -> list[Case]:
    """Return 50 sound tasks and 50 of `BENT`; each item asks for one task (`SETTINGS`)."""
    found = []
    for number in range(50):
        fields = {"domain": shops.trade(number).domain, "world": shops.world(number)}
        found.append(Case(GeneratorItem(f"good-{number}", fields), _bent(lambda draft: draft, number), True,
                          "sound"))
        what = list(BENT)[number % len(BENT)]
        kind, bent = BENT[what]
        found.append(Case(GeneratorItem(f"bad-{number}", fields), _bent(bent, kind + 3 * (number % 2)), False,
                          what))
    return found


def _bent(bent: Callable[[Draft], Draft | str], offset: int,
          ) -> Callable[[Mapping[str, Any]], str | dict[str, Any]]:
    return lambda request: answer(request, bent, offset)


def _edited(edit: Callable[[Draft], object]) -> Callable[[Draft], Draft]:
    def edited(draft: Draft) -> Draft:
        edit(draft)
        return draft

    return edited


BENT: dict[str, tuple[int, Callable[[Draft], Draft | str]]] = {
    "call that is refused": (0, _edited(lambda d: d["calls"][-1]["arguments"].update(count=99))),
    "row that is not there": (1, _edited(lambda d: d["calls"][-1]["arguments"].update(order_id="O77"))),
    "unknown tool": (0, _edited(lambda d: d["calls"].append({"name": "pay", "arguments": {}}))),
    "argument of another type": (0, _edited(lambda d: d["calls"][-1]["arguments"].update(count="2"))),
    "nothing to do": (2, _edited(lambda d: d.update(answers=[]))),
    "call that is refused the second time": (1, _edited(lambda d: d["calls"].append(d["calls"][-1]))),
    "change that nobody needs": (1, _edited(lambda d: d["calls"].insert(3, {
        "name": d["calls"][3]["name"].replace("end_", "make_"),
        "arguments": {"person_id": "P1", "thing_id": "T1", "count": 0}}))),
    "makes and ends again": (0, _edited(lambda d: (d["calls"].append({
        "name": d["calls"][-1]["name"].replace("make_", "end_"), "arguments": {"order_id": "O4"}}),
        d.update(answers=[])))),
    "answer that no result gives": (2, _edited(lambda d: d.update(answers=["31415"]))),
    "answer that the question gives away": (2, _edited(lambda d: d.update(
        question=d["question"] + f" I think it is {d['answers'][0]}."))),
    "question without what is needed": (0, _edited(lambda d: d.update(
        question="Please make an order. What is the total?"))),
    "call with what nobody told": (0, _edited(lambda d: d.update(calls=[{
        **d["calls"][-1], "arguments": {**d["calls"][-1]["arguments"], "person_id": "P2"}}, d["calls"][1]]))),
    "question of something else": (0, _edited(lambda d: d.update(
        question="I am mina@example.com. What is the price of 'Amber Star'?"))),
    "names the tools": (0, _edited(lambda d: d.update(
        question=d["question"] + f" Use {d['calls'][-1]['name']} for it."))),
    "too few calls": (2, _edited(lambda d: d.update(calls=d["calls"][1:]))),
    "far too many calls": (2, _edited(lambda d: d.update(calls=d["calls"] * 6))),
    "no JSON": (0, lambda d: "Here is a nice task: order a cake."),
    "no list of calls": (0, _edited(lambda d: d.update(calls={"all": d["calls"]}))),
    "more fields than asked for": (0, _edited(lambda d: d.update(reward=1))),
}
"""Fault -> kind of task that it is planted in, and what is done to it."""
