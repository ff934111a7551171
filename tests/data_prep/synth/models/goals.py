"""A scripted model for the generator `goals`, and planted tasks."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models import shop_clerk, shops
from tests.data_prep.synth.models.judge import Replies

Draft = dict[str, Any]


def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return a sound task, or the next turn of a solver."""
    return write_task(request, lambda draft: draft)


def write_task(request: Mapping[str, Any], plant_fault: Callable[[Draft], Draft | str],
               offset: int = 0) -> str | dict[str, Any]:
    """Return a task with a fault, or the next turn of a solver.

    Args:
        request: body of a chat completion.
        plant_fault: applied to the task.
        offset: added to the task's number, which decides its kind.
    """
    if "tools" in request:
        return shop_clerk.next_turn(request)
    prompt = request["messages"][-1]["content"]
    world = json.loads(prompt.partition("what they do.\n")[2].partition("\n\nWrite task")[0])
    number = shop_clerk.find_number(prompt, r"Write task number (\d+)") - 1
    task = plant_fault(shops.build_task(world, number + offset))
    return task if isinstance(task, str) else json.dumps(task)


def make_case(fault: str) -> tuple[GeneratorItem, Replies]:
    """Return an item, and the model that writes a task with a fault of `FAULTS`."""
    kind, plant_fault = FAULTS[fault]
    fields = {"domain": shops.TRADES[0].domain, "world": shops.build_world(0), "number": 1}
    return GeneratorItem("bad-0", fields), lambda request: write_task(request, plant_fault, kind)


def _change_last_call(task: Draft, **arguments: Any) -> Draft:
    *calls, last = task["calls"]
    return {**task, "calls": [*calls, {**last, "arguments": {**last["arguments"], **arguments}}]}


FAULTS: dict[str, tuple[int, Callable[[Draft], Draft | str]]] = {
    "call that is refused": (0, lambda task: _change_last_call(task, count=99)),
    "nothing to do": (2, lambda task: {**task, "answers": []}),
    "answer that no result gives": (2, lambda task: {**task, "answers": ["31415"]}),
    "answer that the question gives away": (2, lambda task: {
        **task, "question": f"{task['question']} I think it is {task['answers'][0]}."}),
    "call with what nobody told": (0, lambda task: {
        **task, "calls": [_change_last_call(task, person_id="P2")["calls"][-1], task["calls"][1]]}),
    "question of something else": (0, lambda task: {
        **task, "question": "I am mina@example.com. What is the price of 'Amber Star'?"}),
    "names the tools": (0, lambda task: {
        **task, "question": f"{task['question']} Use {task['calls'][-1]['name']} for it."}),
    "too few calls": (2, lambda task: {**task, "calls": task["calls"][1:]}),
    "no JSON": (0, lambda task: "Here is a nice task: order a cake."),
    "more fields than asked for": (0, lambda task: {**task, "reward": 1}),
}
"""Fault -> kind of task (number modulo 3), and function that puts the fault into a task."""
