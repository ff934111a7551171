"""The calls that should reach a goal, made in the world: whether they do, and what they rest on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.synth.generator import SampleVerdict
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.virtual.spec import Spec, ToolSpec, spec_of
from megatron_sov.judge.tools.worlds.goals import plain, says
from megatron_sov.judge.tools.worlds.virtual import Virtual

SMALL = 20
"""Whole numbers up to this may stand in a question as words."""


@dataclass(frozen=True)
class ReferenceWorld:
    """What came of a task's calls."""

    task: Mapping[str, Any]
    refused: str = ""
    """Why a call gave no result; the rest is then not known."""
    results: tuple[str, ...] = ()
    """Of the calls, as JSON."""
    end: Any = None
    """Of the tables, as goals compare them."""
    num_changing: int = 0
    """Calls that changed a table."""
    done_by: str = ""
    """Something less than all calls that reaches the goal as well, in words."""

    def is_like(self, other: ReferenceWorld) -> bool:
        """Return whether another task of the same world has the same end and the same answers."""
        return (self.end, self._answers) == (other.end, other._answers)

    @property
    def _answers(self) -> list[str]:
        return sorted(plain(answer) for answer in self.task["goal"]["answers"])

    def verdicts(self, min_calls: int, max_calls: int) -> list[SampleVerdict]:
        """Return what is to say of the task; behind the first that fails no more may be meant."""
        calls = self.task["goal"]["calls"]
        if self.refused:
            return [SampleVerdict("reachable goal", False, self.refused)]
        aims = bool(self.num_changing or self.task["goal"]["answers"])
        return [
            SampleVerdict("reachable goal", True),
            SampleVerdict("goal not reached yet", aims and not self.done_by,
                          self.done_by or ("" if aims
                                           else "the calls change nothing, and nothing has to be said")),
            SampleVerdict("number of calls", min_calls <= len(calls) <= max_calls, f"{len(calls)}"),
            _first("answers from tools", self._unfounded_answers()),
            _first("question tells enough", self._unknown_arguments()),
            _first("question names no tools", self._named_tools())]

    def _unfounded_answers(self) -> list[str]:
        """Return answers that no call gives, or that the question gives away where nothing has to change."""
        question, results = plain(self.task["question"]), plain("\n".join(self.results))
        found = []
        for answer in self.task["goal"]["answers"]:
            if not says(results, plain(answer)):
                found.append(f"no result of the calls says {answer[:60]!r}")
            elif not self.num_changing and says(question, plain(answer)):
                found.append(f"the question itself says {answer[:60]!r}")
        return found

    def _unknown_arguments(self) -> list[str]:
        """Return arguments of changing calls that neither the question nor an earlier result tells."""
        spec = spec_of(self.task["world"])
        told = plain(" ".join((self.task["question"], spec.rules)))
        found = []
        for call, result in zip(self.task["goal"]["calls"], self.results, strict=True):
            tool = spec.tools[call["name"]]
            bound = {name: value for name, value in call["arguments"].items()
                     if tool.changes and name not in _free_arguments(tool, spec)}
            found += [f"{call['name']}.{name} = {json.dumps(value, ensure_ascii=False)[:60]} is told neither "
                      "by the question nor by a result before it"
                      for name, value in bound.items() if not _is_told(value, tool.schemas[name], told)]
            told += " " + plain(result)
        return found

    def _named_tools(self) -> list[str]:
        question = self.task["question"].casefold()
        return [f"the question names the tool {name}" for name in spec_of(self.task["world"]).tools
                if "_" in name and name.casefold() in question]


def _free_arguments(tool: ToolSpec, spec: Spec) -> frozenset[str]:
    """Return the arguments of a tool that go into free columns alone."""
    free, bound = set[str](), set[str]()
    for step in tool.steps:
        for column, value in step.columns.items():
            is_free = bool(step.table) and column in spec.tables[step.table].free
            (free if is_free else bound).update(value.names)
    return frozenset(free - bound)


def _is_told(value: Any, schema: Mapping[str, Any], told: str) -> bool:
    """Return whether a text tells an argument, as far as can be seen without knowing what it means."""
    if isinstance(value, list):
        return all(_is_told(part, schema.get("items", {}), told) for part in value)
    if value is None or isinstance(value, bool) or "enum" in schema:
        return True
    if isinstance(value, str):
        return not value.strip() or plain(value) in told
    whole = int(value) if float(value).is_integer() else value
    return abs(value) <= SMALL or says(told, str(whole))


def _first(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, problems[0] if problems else "")


def reference_of(task: Mapping[str, Any]) -> ReferenceWorld:
    """Return what comes of a task's goal in its world.

    Args:
        task: of `virtual`, whose world is sound.
    """
    virtual = Virtual()
    virtual.reset({**task, "goal": {}})
    calls, first = task["goal"]["calls"], virtual.snapshot()
    results, changing = [], []
    for place, call in enumerate(calls):
        before = virtual.snapshot()
        try:
            result = virtual.call(call["name"], call["arguments"])
        except ToolFault as e:
            return ReferenceWorld(task, f"call {place + 1}: {e.reason}")
        results.append(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
        if virtual.snapshot() != before:
            changing.append(place)
    end = _compared(virtual)
    done_by = ""
    for left_out in changing:
        virtual.restore(first)
        if _end_without(virtual, calls, left_out) == end:
            done_by = f"the goal is reached without call {left_out + 1} ({calls[left_out]['name']})"
            break
    virtual.restore(first)
    if changing and _compared(virtual) == end:
        done_by = "the calls undo each other: the tables are as they were at first"
    return ReferenceWorld(task, "", tuple(results), end, len(changing), done_by)


def _end_without(virtual: Virtual, calls: Sequence[Mapping[str, Any]], left_out: int) -> Any:
    """Return the end that all calls but one lead to; those that are refused then change nothing."""
    for place, call in enumerate(calls):
        if place != left_out:
            try:
                virtual.call(call["name"], call["arguments"])
            except ToolFault:
                continue
    return _compared(virtual)


def _compared(virtual: Virtual) -> dict[str, Any]:
    return {table: virtual.compared(table, rows) for table, rows in virtual.state.items()}
