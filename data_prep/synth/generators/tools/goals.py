"""Goals: a world becomes tasks whose end can be checked.

A model writes what a user wants and the calls that an assistant should make; the calls are made, and the end
that they lead to is the goal.  So it can be reached; that it is not reached already, that no call is idle,
and that the question tells what is needed, is checked as well, and other draws of the model try the task from
its question alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.tools.conversation import ConversationTable, Manner, play, scored
from data_prep.synth.generators.tools.draws import Draws
from data_prep.synth.generators.tools.reference import ReferenceWorld, reference_of
from data_prep.synth.generators.tools.replies import items_of, object_in, written
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, NotBlank, NotNegativeInt, SettingsProblem, at_most, find_broken)
from megatron_sov.judge.tools.environment import LIMITS
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import order
from megatron_sov.judge.tools.virtual.spec import problems_of

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
        """Return what does not fit together."""
        return find_broken(
            self, "", (not self.num_solvers or self.min_solved <= self.num_solvers, "min_solved",
             f"must be at most num_solvers = {self.num_solvers}"))


class Goals(Generator):
    """Makes tasks of worlds."""

    name: ClassVar[str] = "goals"
    kind: Kind = "task"
    help: ClassVar[str] = "tasks with goals that can be checked, in worlds of the generator worlds"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "goals/task": ("world", "language", "earlier", "min_calls", "max_calls", "number")}
    Settings: ClassVar[type[Any]] = GoalSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the worlds of files in JSON lines, or of the output of `worlds`."""
        for item in items_of(inputs, ["world"], '{"domain": ..., "world": {...}}, as worlds makes them'):
            if problems := problems_of(item.fields["world"]):
                raise UserError(f"--input: the world of {item.id} is not sound: {problems[0]}; leave it out, "
                                "or mend it")
            yield item

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the world's tasks."""
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
                known.append(reference)
                if s.num_solvers:
                    notes |= self._solved(task, ask, f"{item.id}/{number}", number)
                    verdicts.append(SampleVerdict("solved", notes["solved"] >= s.min_solved,
                                                  f"{notes['solved']} of {s.num_solvers}"))
            yield GeneratedSample(task, tuple(verdicts), group=item.id, notes=notes)

    def _solved(self, task: Mapping[str, Any], ask: Ask, name: str, number: int) -> dict[str, Any]:
        """Return how many draws of the model reach the goal from the question alone."""
        s = self.settings
        limits = replace(LIMITS["test"], max_turns=s.max_turns)
        manner = Manner(limits, max_tokens=s.max_tokens)
        solved = 0
        with EnvironmentHost(order("virtual", {}), limits) as host:
            for solver in range(s.num_solvers):
                draw = number * s.num_solvers + solver
                played = play(task, ConversationTable(ask, host, manner, draw, Draws(name, solver)))
                solved += played.end == "answered" and scored(played, host, played.answers[-1]).reward == 1
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
