"""A scripted model for the generator `goals`, and planted tasks."""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.cases import Case

Draft = dict[str, Any]


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


def planted(what: str) -> Case:
    """Return a task with a fault of `BENT`."""
    kind, bent = BENT[what]
    fields = {"domain": shops.trade(0).domain, "world": shops.world(0), "number": 1}
    return Case(GeneratorItem("bad-0", fields), _bent(bent, kind), False, what)


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
    "nothing to do": (2, _edited(lambda d: d.update(answers=[]))),
    "answer that no result gives": (2, _edited(lambda d: d.update(answers=["31415"]))),
    "answer that the question gives away": (2, _edited(lambda d: d.update(
        question=d["question"] + f" I think it is {d['answers'][0]}."))),
    "call with what nobody told": (0, _edited(lambda d: d.update(calls=[{
        **d["calls"][-1], "arguments": {**d["calls"][-1]["arguments"], "person_id": "P2"}}, d["calls"][1]]))),
    "question of something else": (0, _edited(lambda d: d.update(
        question="I am mina@example.com. What is the price of 'Amber Star'?"))),
    "names the tools": (0, _edited(lambda d: d.update(
        question=d["question"] + f" Use {d['calls'][-1]['name']} for it."))),
    "too few calls": (2, _edited(lambda d: d.update(calls=d["calls"][1:]))),
    "no JSON": (0, lambda d: "Here is a nice task: order a cake."),
    "more fields than asked for": (0, _edited(lambda d: d.update(reward=1))),
}
"""Fault -> kind of task that it is planted in, and what is done to it."""
