"""Goals: a world becomes tasks whose end can be checked.

A model writes what a user wants and the calls that an assistant should make; the calls are made, and the end
that they lead to is the goal.  So it can be reached; that it is not reached already, that no call is idle,
and that the question tells what is needed, is checked as well, and other draws of the model try the task from
its question alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.tools.conversation import ConversationTable, Manner, play, scored
from data_prep.synth.generators.tools.replies import items_of, object_in, written
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, NotBlank, NotNegativeInt, SettingsProblem, at_most, find_broken)
from megatron_sov.judge.tools.environment import LIMITS, ToolFault
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import order
from megatron_sov.judge.tools.worlds.goals import plain, says
from megatron_sov.judge.tools.worlds.virtual import Tables, Virtual, problems_of, world_of

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
    bound: tuple[Mapping[str, Any], ...] = ()
    """Of each call, the arguments that somebody has to have told."""
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
        told = plain(" ".join((self.task["question"], world_of(self.task["world"]).rules)))
        found = []
        for call, result, bound in zip(self.task["goal"]["calls"], self.results, self.bound, strict=True):
            found += [f"{call['name']}.{name} = {json.dumps(value, ensure_ascii=False)[:60]} is told neither "
                      "by the question nor by a result before it"
                      for name, value in bound.items() if not _is_told(value, told)]
            # after the check: a result is known only to the calls that follow
            told += " " + plain(result)
        return found

    def _named_tools(self) -> list[str]:
        question = self.task["question"].casefold()
        return [f"the question names the tool {name}" for name in world_of(self.task["world"]).tools
                if "_" in name and name.casefold() in question]


def _bound_arguments(virtual: Virtual, before: Tables, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a changing call that have to be known: all but choices of a fixed list, and
    texts that it has written into free columns alone."""
    free, bound = list[Any](), list[Any]()
    for name, rows in virtual.state.items():
        changed = [row for key, row in rows.items() if before[name].get(key) != row]
        for row in changed:
            for column, value in row.items():
                (free if column in virtual.world.tables[name].free else bound).append(value)
    described = virtual.world.tools[call["name"]].description_for_models()["function"]
    schemas = described["parameters"]["properties"]
    return {name: value for name, value in call["arguments"].items()
            if "enum" not in schemas[name] and (value in bound or value not in free)}


def _is_told(value: Any, told: str) -> bool:
    """Return whether a text tells an argument, as far as can be seen without knowing what it means."""
    if isinstance(value, list):
        return all(_is_told(part, told) for part in value)
    if value is None or isinstance(value, (bool, dict)):
        return True
    if isinstance(value, str):
        return not value.strip() or plain(value) in told
    whole = int(value) if float(value).is_integer() else value
    # small numbers may be words, or be meant by "a" and "both"
    return abs(value) <= SMALL or says(told, str(whole))


def _first(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, problems[0] if problems else "")


def reference_of(task: Mapping[str, Any]) -> ReferenceWorld:
    """Return what comes of a task's goal in its world.

    Args:
        task: of `virtual`, whose world is sound.
    """
    virtual = Virtual()
    # without the goal: what the calls lead to is the goal
    virtual.reset({**task, "goal": {}})
    calls, first = task["goal"]["calls"], virtual.snapshot()
    results, changing, bound = [], [], []
    for place, call in enumerate(calls):
        before = virtual.snapshot()
        try:
            result = virtual.call(call["name"], call["arguments"])
        except ToolFault as e:
            return ReferenceWorld(task, f"call {place + 1}: {e.reason}")
        results.append(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
        is_changing = virtual.snapshot() != before
        if is_changing:
            changing.append(place)
        bound.append(_bound_arguments(virtual, before, call) if is_changing else {})
    end = _compared(virtual)
    done_by = ""
    # a call without which the end is the same is idle
    for left_out in changing:
        virtual.restore(first)
        if _end_without(virtual, calls, left_out) == end:
            done_by = f"the goal is reached without call {left_out + 1} ({calls[left_out]['name']})"
            break
    virtual.restore(first)
    # the end is that of the beginning
    if changing and _compared(virtual) == end:
        done_by = "the calls undo each other: the tables are as they were at first"
    return ReferenceWorld(task, "", tuple(results), tuple(bound), end, len(changing), done_by)


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


FIELDS = {"question", "calls", "answers"}


@dataclass(frozen=True)
class GoalSettings:
    """How tasks are made."""

    tasks_per_world: AtLeastOne = 4
    """Asked for one after the other; each is told the questions before it."""
    language: NotBlank = "English"
    """Of questions."""
    min_calls: Annotated[NotNegativeInt, at_most("max_calls")] = 2
    """Of the reference, reading ones among them."""
    max_calls: AtLeastOne = 10
    """Of the reference."""
    num_solvers: NotNegativeInt = 2
    """Times that the model tries a task from its question alone; 0: it does not."""
    min_solved: NotNegativeInt = 1
    """Of them, that have to reach the goal."""
    max_turns: AtLeastOne = 12
    """Of a solver."""
    temperature: Temperature = 0.8
    """Of the writer; solvers have 0.7."""
    max_tokens: AtLeastOne = 2048
    """Of an answer."""

    def problems(self) -> list[SettingsProblem]:
        return find_broken(
            self, "", (not self.num_solvers or self.min_solved <= self.num_solvers, "min_solved",
             f"must be at most num_solvers = {self.num_solvers}"))


class Goals(Generator):
    """Makes tasks of worlds."""

    name: ClassVar[str] = "goals"
    kind: Kind = "task"
    help: ClassVar[str] = "tasks with goals that can be checked, in worlds of the generator worlds"
    Settings: ClassVar[type[Any]] = GoalSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the worlds of files in JSON lines, or of the output of `worlds`."""
        for item in items_of(inputs, "world", '{"domain": ..., "world": {...}}, as worlds makes them'):
            if problems := problems_of(item.fields["world"]):
                raise UserError(f"--input: the world of {item.id} is not sound: {problems[0]}; leave it out, "
                                "or mend it")
            yield item

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        s, world = self.settings, item.fields["world"]
        earlier: list[str] = []
        known: list[ReferenceWorld] = []
        for number in range(s.tasks_per_world):
            draft = object_in(ask(
                "goals/task", world=written(world), language=s.language, earlier=earlier, number=number + 1,
                min_calls=s.min_calls, max_calls=s.max_calls, temperature=s.temperature,
                max_tokens=s.max_tokens)[0])
            domain = str(item.fields.get("domain", ""))
            if isinstance(draft, str) or (wrong := _wrong_form(draft)):
                why = draft if isinstance(draft, str) else wrong
                yield GeneratedSample({"domain": domain}, (SampleVerdict("form", False, why),))
                continue
            task = {"question": draft["question"], "domain": domain, "world": world,
                    "goal": {"calls": draft["calls"], "answers": draft.get("answers", [])}}
            reference = reference_of(task)
            verdicts = [*reference.verdicts(s.min_calls, s.max_calls),
                        SampleVerdict("unlike the others", not any(reference.is_like(one) for one in known))]
            notes: dict[str, Any] = {"calls": len(draft["calls"]), "changes": reference.num_changing}
            if all(verdict.passed for verdict in verdicts):
                earlier.append(draft["question"])
                # sound ones alone: a task that failed keeps no other one out
                known.append(reference)
                if s.num_solvers:
                    notes |= self._solved(task, ask, number)
                    verdicts.append(SampleVerdict("solved", notes["solved"] >= s.min_solved,
                                                  f"{notes['solved']} of {s.num_solvers}"))
            yield GeneratedSample(task, tuple(verdicts), group=item.id, notes=notes)

    def _solved(self, task: Mapping[str, Any], ask: Ask, number: int) -> dict[str, Any]:
        """Return how many draws of the model reach the goal from the question alone."""
        s = self.settings
        limits = replace(LIMITS["test"], max_turns=s.max_turns)
        manner = Manner(limits, max_tokens=s.max_tokens)
        solved = 0
        with EnvironmentHost(order("virtual", {}), limits) as host:
            for solver in range(s.num_solvers):
                # one number for each solver of the world: equal ones would share their answers
                draw = number * s.num_solvers + solver
                played = play(task, ConversationTable(ask, host, manner, draw))
                if played.end == "answered" and scored(played, host, played.answers[-1]).reward == 1:
                    solved += 1
        return {"solved": solved, "solvers": s.num_solvers}


def _wrong_form(draft: Mapping[str, Any]) -> str:
    """Return why an object is no draft of a task; empty: it is one."""
    question, calls, answers = draft.get("question"), draft.get("calls"), draft.get("answers", [])
    if unknown := sorted(set(draft) - FIELDS):
        return f"has {unknown[0][:40]!r} beside {', '.join(sorted(FIELDS))}"
    if not isinstance(question, str) or not question.strip():
        return "question must be text"
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        return "answers must be a list of texts"
    if not isinstance(calls, list) or not all(
            isinstance(call, dict) and set(call) == {"name", "arguments"} and isinstance(call["name"], str)
            and isinstance(call["arguments"], dict) for call in calls):
        return "calls must be a list of objects with name and arguments"
    return ""
