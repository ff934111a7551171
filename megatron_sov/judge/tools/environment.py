"""An environment: typed tools, a state and a goal that can be checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.faults import ToolFault
from megatron_sov.judge.tools.schema import Tool, tools_of

Task = Mapping[str, Any]
"""What is to be done, in JSON: `question`, what the world is at first, and how the end is checked."""


@dataclass(frozen=True)
class Observation:
    """What a model is told first."""

    user: str
    """The question."""
    system: str = ""
    """Rules of the world; empty: no system message."""


class Environment(Protocol):
    """What every environment has; its settings are what it is made with, by name and with defaults.

    One object plays one episode at a time, and many after each other: `reset` forgets the last one.
    """

    def reset(self, task: Task) -> Observation:
        """Begin an episode.

        Raises:
            UserError: the task is none of this environment's.
        """
        ...

    def tools(self) -> Sequence[dict[str, Any]]:
        """Return the tools of this episode, as OpenAI describes functions."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return what a tool gives: a text, or a JSON value.

        Raises:
            ToolFault: why there is nothing; the state is then brought back to that before the call.
        """
        ...

    def score(self, answer: str) -> Score | float:
        """Return the reward of the episode.

        Args:
            answer: what the model said in the end; empty where it did not come to an end.
        """
        ...

    def snapshot(self) -> Any:
        """Return the state as a JSON value."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from a state that `snapshot` gave, in this process or another one."""
        ...


class World:
    """An environment whose tools are its methods marked with `@tool`, and whose state is `self.state`."""

    SYSTEM = ""
    """Rules of the world, for the model."""
    EXAMPLES: tuple[Task, ...] = ()
    """Tasks to try it with."""

    state: dict[str, Any]
    """JSON values alone."""
    task: Task
    """Of this episode."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode."""
        self.task, self.state = task, copy.deepcopy(self.first_state(task))
        return Observation(text_in(task, "question"), text_in(task, "system", self.rules()))

    def rules(self) -> str:
        """Return what models are told where a task has no `system` of its own."""
        return self.SYSTEM

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the state that an episode begins with."""
        return {}

    @cached_property
    def by_name(self) -> dict[str, Tool]:
        """Name -> tool; of methods that are marked, unless a world makes its own."""
        return {tool.name: tool for tool in tools_of(self)}

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools as OpenAI describes functions."""
        return [tool.description_for_models() for tool in self.by_name.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return what a tool gives for arguments of the right types."""
        if name not in self.by_name:
            raise ToolFault("unknown_tool", unknown(name, self.by_name))
        return self.by_name[name].call(arguments)

    def snapshot(self) -> Any:
        """Return a copy of the state."""
        return copy.deepcopy(self.state)

    def restore(self, state: Any) -> None:
        """Take a state over."""
        self.state = copy.deepcopy(state)


def unknown(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return what a model is told that calls a tool which does not exist."""
    return f"there is no tool {name[:60]!r}; the tools are {', '.join(known)}"


def text_in(task: Task, name: str, default: str | None = None) -> str:
    """Return a field of a task that has to be text.

    Raises:
        UserError: it is missing, or something else.
    """
    value = task.get(name, default)
    if not isinstance(value, str):
        said = f"{name} = {str(value)[:60]!r}: must be text" if name in task else f"has no {name!r}"
        raise UserError(f"the task {said}")
    return value
