"""Checks of tasks in virtual worlds: the goal of a task is the end that its reference calls lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.replies import NoReply
from megatron_sov.judge.tools.environment import InfrastructureFault, ToolFault
from megatron_sov.judge.tools.worlds.goals import plain, says
from megatron_sov.judge.tools.worlds.virtual import Virtual

DRAFT_FIELDS = {"question", "calls", "answers"}


def draft_problem(draft: Any) -> str:
    """Return why an object is no draft of a task; empty: it is one."""
    if not isinstance(draft, Mapping):
        return str(draft)
    if unknown := sorted(set(draft) - DRAFT_FIELDS):
        return f"has {unknown[0][:40]!r} beside {', '.join(sorted(DRAFT_FIELDS))}"
    question, calls, answers = draft.get("question"), draft.get("calls"), draft.get("answers", [])
    if not isinstance(question, str) or not question.strip():
        return "question must be text"
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        return "answers must be a list of texts"
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        return "calls must be a list of objects with name and arguments"
    return ""


def _is_call(call: Any) -> bool:
    return (isinstance(call, dict) and set(call) == {"name", "arguments"} and isinstance(call["name"], str)
            and isinstance(call["arguments"], dict))


def task_verdicts(task: Mapping[str, Any], min_calls: int, max_calls: int) -> list[SampleVerdict]:
    """Return the verdicts on a task; of one whose calls are refused the first alone.

    Args:
        task: of `virtual`, whose world is sound and whose goal has the form of a draft.
        min_calls: of the reference.
        max_calls: of the reference.

    Raises:
        NoReply: the sandbox failed: the item is made again.
    """
    calls, answers = task["goal"]["calls"], task["goal"]["answers"]
    virtual = Virtual()
    # without the goal: the end that the calls lead to is the goal
    virtual.reset({**task, "goal": {}})
    first, changing = virtual.snapshot(), []
    for place, call in enumerate(calls):
        before = virtual.snapshot()
        try:
            virtual.call(call["name"], call["arguments"])
        except InfrastructureFault as e:
            raise NoReply(e.reason) from None
        except ToolFault as e:
            return [SampleVerdict("reachable goal", False, f"call {place + 1}: {e.reason}")]
        if virtual.snapshot() != before:
            changing.append(place)
    question = plain(task["question"])
    told = [] if changing else [answer for answer in answers if says(question, plain(answer))]
    tools = [name for name in virtual.by_name if "_" in name and name.casefold() in question]
    idle = _idle_calls(virtual, first, calls, changing) if changing or answers else (
        "the calls change nothing, and nothing has to be said")
    return [
        SampleVerdict("reachable goal", True),
        SampleVerdict("goal not reached yet", not idle, idle),
        SampleVerdict("number of calls", min_calls <= len(calls) <= max_calls, f"{len(calls)}"),
        SampleVerdict("answers from tools", not told, f"the question says {', '.join(told)[:60]!r}"),
        SampleVerdict("question names no tools", not tools, ", ".join(tools))]


def _idle_calls(virtual: Virtual, first: Any, calls: Sequence[Mapping[str, Any]],
                changing: Sequence[int]) -> str:
    """Return how fewer calls lead to the same end; empty: none do.

    Args:
        virtual: at the end of all calls.
        first: its state before them.
        calls: of the reference.
        changing: places of the calls that change a table.
    """
    end = _compared(virtual)
    for left_out in changing:
        virtual.restore(first)
        for call in (*calls[:left_out], *calls[left_out + 1:]):
            try:
                virtual.call(call["name"], call["arguments"])
            except InfrastructureFault as e:
                raise NoReply(e.reason) from None
            except ToolFault:  # it needs what the call that is left out has changed
                continue
        if _compared(virtual) == end:
            return f"the goal is reached without call {left_out + 1} ({calls[left_out]['name']})"
    virtual.restore(first)
    if changing and _compared(virtual) == end:
        return "the calls undo each other: the tables are as they were at first"
    return ""


def _compared(virtual: Virtual) -> dict[str, Any]:
    return {table: virtual.compared(table, rows) for table, rows in virtual.state.items()}
